// Dispatch, second half: each message is pulled out of the inbox and fanned out to its local
// experts.
//
// Order of rows: by source rank, then by token. Nothing depends on arrival order or on the grid.
// CTA 0 keeps the books: it reports what came. CTA b > 0 takes slot (b - 1) / R of source
// (b - 1) % R, then the slot gridDim.x - 1 further on: known before any count has arrived, so that
// counts and rows are waited for together.
#pragma once

#include "cuda/counts.cuh"
#include "ep/fp8.h"

namespace ep {

// The last warps copy the least of a row with most hidden sizes.
inline constexpr int kNoteWarp = kThreads / 32 - 1;
__device__ __forceinline__ int this_warp() { return static_cast<int>(threadIdx.x / 32); }

enum class Pulled { kMessage, kNothing, kGaveUp };

// A thread's vectors of one pass over a message, as last seen.
template <int U>
struct Look {
    ptx::Vector v[U];

    __device__ __forceinline__ void load(const uint8_t* slot, int base, int num_vectors) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads + threadIdx.x;
            if (i < num_vectors) v[u] = ptx::load_line_vector(slot + 16 * i);
        }
    }
    __device__ __forceinline__ Missing missing(const uint8_t* slot, int base, int num_vectors,
                                               int source, uint64_t epoch) const {
        Missing missing{false, source, epoch, 0, nullptr};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads + threadIdx.x;
            if (i < num_vectors && holds_tag(threadIdx.x) && v[u].hi != epoch) {
                missing.waiting = true;
                missing.seen = v[u].hi;
                missing.at = slot + 16 * i;
            }
        }
        return missing;
    }
    __device__ __forceinline__ void lay_out(int base, int num_vectors, uint64_t* message) const {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads + threadIdx.x;
            if (i >= num_vectors) continue;
            const int g = first_granule(i);
            message[g] = v[u].lo;
            if (!holds_tag(i)) message[g + 1] = v[u].hi;
        }
    }
};

__device__ __forceinline__ const uint8_t* slot_address(const View& view, int source, int slot,
                                                       uint64_t epoch) {
    return view.dispatch_in + view.dispatch_at(epoch) +
           static_cast<int64_t>(source * view.max_tokens + slot) * view.message_stride;
}

// Waits for the message in a slot, or for the news that the source sends fewer. Lays it out flat in
// shared memory. Warp by warp; the caller synchronises. `looked`: `look` holds the first pass.
template <int U>
__device__ __forceinline__ Pulled pull_slot(const View& view, Watch& watch, int source, int slot,
                                            uint64_t epoch, RecvScratch scratch, Look<U>& look,
                                            bool looked) {
    const int num_vectors = view.message_vectors;
    const uint8_t* from = slot_address(view, source, slot, epoch);
#pragma unroll 1
    for (int base = 0; base < num_vectors; base += U * kThreads) {
#pragma unroll 1
        while (true) {
            if (!looked) look.load(from, base, num_vectors);
            looked = false;
            const Missing missing = look.missing(from, base, num_vectors, source, epoch);
            if (!__any_sync(kFullWarp, missing.waiting)) break;
            const int32_t announced = messages_so_far(source, scratch);
            if (slot >= announced) return Pulled::kNothing;
            // Once announced it will come; until then both must be watched.
            const bool patient = announced != RecvScratch::kUnknown;
            if (patient ? !wait_for_more(watch, missing) : watch.give_up(missing)) {
                return Pulled::kGaveUp;
            }
        }
        look.lay_out(base, num_vectors, scratch.message);
    }
    return Pulled::kMessage;
}

// Lane k: the row of entry k, or -1 if it is not ours. Every warp works it out for itself, which is
// quicker than telling the others.
__device__ __forceinline__ int place_entry(const View& view, const RecvTarget& target, int source,
                                           const Entry& entry, RecvScratch scratch) {
    const int local_experts = view.local_experts;
    const int x = entry.expert - view.rank * local_experts;
    if (x < 0 || x >= local_experts) return -1;
    const int32_t announced = scratch.rows[source * view.local_experts + x];
    if (static_cast<uint32_t>(entry.position) >= static_cast<uint32_t>(announced)) {
        // A damaged heap: the row would lie beyond the source's own.
        fail(view, FaultCode::kCount, Op::kDispatch, source, announced, entry.position);
        return -1;
    }
    int row = entry.position;
#pragma unroll 1
    for (int s = 0; s < source; ++s) row += scratch.rows[s * local_experts + x];
    row += target.format == Format::kBatched ? x * view.max_messages : scratch.first_row[x];
    return row;
}

// One warp: what combine needs to find the rows again. `row` and `entry` are those of lane k.
__device__ inline void note_rows(const View& view, const RecvTarget& target, int source, int slot,
                                 int token, int row, const Entry& entry) {
    const int topk = view.topk;
    const int lane = threadIdx.x & 31;
    if (target.format == Format::kCompact && lane < topk) {
        const int local_experts = view.local_experts;
        const int x = entry.expert - view.rank * local_experts;
        const bool mine = x >= 0 && x < local_experts;
        const int64_t at =
            static_cast<int64_t>(__shfl_sync((1ull << topk) - 1, row, 0)) * topk + lane;
        target.topk_idx[at] = mine ? x : -1;
        target.topk_weights[at] = mine ? entry.weight : 0.0f;
    }
    __syncwarp();
    const unsigned has_row = __ballot_sync(kFullWarp, row >= 0);
    const int message = source * view.max_tokens + slot;
    RowRef* refs = target.routing.refs + static_cast<int64_t>(message) * topk;
    const int index = __popc(has_row & ((1u << lane) - 1));
    const float weight = target.format == Format::kCompact ? 1.0f : entry.weight;
    if (row >= 0) {
        refs[index] = {row, weight};
        if (target.source_token != nullptr) target.source_token[row] = token;
    }
    if (lane == 0) target.routing.tokens[message] = token;
    if (lane == 0 && __popc(has_row) < topk) refs[__popc(has_row)] = {-1, 0.0f};
}

// Where the scales of a lane's row begin. `x`: its local expert.
__device__ __forceinline__ int first_scale(const View& view, const RecvTarget& target, int row,
                                           int x) {
    const bool batched = target.format == Format::kBatched;
    const int within = batched ? row - x * view.max_messages : row;
    return (batched ? x * target.scales.expert_stride : 0) + within * target.scales.row_stride;
}

// Word i of a row's scales as the caller wants them.
__device__ __forceinline__ uint32_t scale_word(const uint32_t* scales, int i, int num_scales,
                                               bool as_ue8m0) {
    if (!as_ue8m0) return scales[i];
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (4 * i + j < num_scales) word |= ue8m0(scales[4 * i + j]) << (8 * j);
    }
    return word;
}

// Copies the message in shared memory to every place it has here. All threads: each reads a vector
// of the row, or a word of the scales, and stores it once for each of our experts.
__device__ __forceinline__ void copy_message(const View& view, const RecvTarget& target,
                                             const uint8_t* message, unsigned has_row, int row,
                                             int first_scale) {
    const auto* scales = reinterpret_cast<const uint32_t*>(message + view.scales_offset);
    const auto* vectors = reinterpret_cast<const uint4*>(message + view.row_offset);
    const bool as_ue8m0 = target.scales.ue8m0;
    const int words = as_ue8m0 ? (view.num_scales + 3) / 4 : view.num_scales;
#pragma unroll 1
    for (int base = 0; base < view.row_vectors + words; base += kThreads) {
        const int i = base + static_cast<int>(threadIdx.x);
        const int g = i - view.row_vectors;
        const bool is_row = g < 0;
        const bool is_scale = !is_row && g < words;
        uint4 piece{};
        uint32_t word = 0;
        if (is_row) piece = vectors[i];
        if (is_scale) word = scale_word(scales, g, view.num_scales, as_ue8m0);
        uint4* row_to = reinterpret_cast<uint4*>(target.x) + i;
        uint32_t* word_to = target.scales.words + g * target.scales.group_stride;
#pragma unroll 1
        for (unsigned left = has_row; left != 0; left &= left - 1) {
            const int k = __ffs(left) - 1;
            const int to = __shfl_sync(kFullWarp, row, k);
            const int first = __shfl_sync(kFullWarp, first_scale, k);
            if (is_row) row_to[static_cast<int64_t>(to) * view.row_vectors] = piece;
            if (is_scale) word_to[first] = word;
        }
    }
}

__device__ __forceinline__ void fan_out(const View& view, const RecvTarget& target, int source,
                                        int slot, RecvScratch scratch) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(scratch.message);
    const auto* entries = reinterpret_cast<const Entry*>(bytes + view.entries_offset);
    const int lane = threadIdx.x & 31;
    const bool compact = target.format == Format::kCompact;
    const Entry entry = lane < view.topk ? entries[lane] : Entry{-1, 0, 0.0f};
    int row = -1;
    if (compact) {
        if (lane == 0) row = messages_before(source, scratch) + slot;
    } else {
        row = place_entry(view, target, source, entry, scratch);
    }
    const unsigned has_row = __ballot_sync(kFullWarp, row >= 0);
    const int x = compact ? 0 : entry.expert - view.rank * view.local_experts;
    copy_message(view, target, bytes, has_row, row, first_scale(view, target, row, x));
    if (this_warp() == kNoteWarp) {
        const auto* header = reinterpret_cast<const MessageHeader*>(bytes + view.header_offset);
        note_rows(view, target, source, slot, header->token, row, entry);
    }
}

// Compact: rows past the last message choose no expert.
__device__ inline void clear_unused_rows(const View& view, const RecvTarget& target,
                                         int num_messages) {
    const int topk = view.topk;
    const int64_t end = static_cast<int64_t>(view.max_messages) * topk;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t i = static_cast<int64_t>(num_messages) * topk + blockIdx.x * kThreads + threadIdx.x;
#pragma unroll 1
    for (; i < end; i += step) target.topk_idx[i] = -1;
}

// One warp.
__device__ inline void note_received(const View& view, RecvScratch scratch) {
    StepStats* stats = view.stats;
    const int lane = threadIdx.x & 31;
    int rows = 0;
#pragma unroll 1
    for (int i = lane; i < view.num_experts; i += 32) rows += scratch.rows[i];
    rows = __reduce_add_sync(kFullWarp, rows);
    if (lane != 0) return;
    stats->messages_received += messages_before(view.num_ranks, scratch);
    stats->rows_received += rows;
}

// CTA 0: what came, to the caller and to the statistics. False: gave up.
__device__ __noinline__ inline bool keep_books(const View& view, const RecvTarget& target,
                                               Turn turn, RecvScratch scratch) {
    const bool ok = pull_counts(view, target, turn, scratch, [] {});
    if (__syncthreads_or(!ok)) return false;
    report_counts(view, target, scratch);
    if (target.format == Format::kContiguous) place_experts(view, target, scratch);
    if (this_warp() == kNoteWarp) {
        note_received(view, scratch);
        advance(view.state->dispatched, view.state->dispatch_readers, turn.epoch, false);
    }
    return true;
}

// The other CTAs: the rows. False: gave up.
__device__ __forceinline__ bool receive_rows(const View& view, const RecvTarget& target,
                                             const Turn& turn, RecvScratch scratch) {
    constexpr int U = 2;
    const uint64_t epoch = turn.epoch;
    const int step = static_cast<int>(gridDim.x) - 1;
    int item = static_cast<int>(blockIdx.x) - 1;
    int slot = view.by_ranks(item);
    int source = item - slot * view.num_ranks;
    Look<U> look;
    bool looked = slot < view.max_tokens;
    bool ok = pull_counts(view, target, turn, scratch, [&] {
        if (looked) {
            look.load(slot_address(view, source, slot, epoch), 0, view.message_vectors);
        }
    });
    Watch watch{view, Op::kDispatch};
    bool counted = false;
#pragma unroll 1
    while (true) {
        Pulled pulled = Pulled::kNothing;
        if (ok && slot < view.max_tokens) {
            pulled = pull_slot<U>(view, watch, source, slot, epoch, scratch, look, looked);
        }
        looked = false;
        if (__syncthreads_or(!ok || pulled == Pulled::kGaveUp)) return false;
        // The barrier above made every source's counts visible.
        if (!counted && target.format == Format::kContiguous) place_experts(view, target, scratch);
        counted = true;
        if (slot < scratch.messages[source]) fan_out(view, target, source, slot, scratch);
        int most = 0;
#pragma unroll 1
        for (int s = 0; s < view.num_ranks; ++s) most = max(most, scratch.messages[s]);
        item += step;
        if (item >= most * view.num_ranks) return true;
        slot = view.by_ranks(item);
        source = item - slot * view.num_ranks;
        __syncthreads();  // the message buffer is free again
    }
}

// The whole grid, at least two CTAs, behind prepare_recv.
__device__ __forceinline__ void dispatch_recv(const View& view, const RecvTarget& target,
                                              const Turn& turn, RecvScratch scratch) {
    if (turn.absent.maybe != 0) clear_absent(view, turn.absent, scratch);
    report_epoch_read<kThreads>(this_warp() == kNoteWarp, (threadIdx.x & 31) == 0,
                                view.state->dispatch_readers, turn.epoch);
    const bool ok = blockIdx.x == 0 ? keep_books(view, target, turn, scratch)
                                    : receive_rows(view, target, turn, scratch);
    if (ok && target.format == Format::kCompact) {
        clear_unused_rows(view, target, messages_before(view.num_ranks, scratch));
    }
}

}  // namespace ep

// Dispatch, second half: each message is pulled out of the inbox and fanned out to its local
// experts.
//
// Order of rows: by source rank, then by token. Nothing depends on arrival order or on the grid.
// CTA 0 keeps the books: it reports what came. CTA b > 0 takes slot (b - 1) / R of source
// (b - 1) % R, then the slot gridDim.x - 1 further on: known before any count has arrived, so that
// counts and rows are waited for together.
#pragma once

#include "cuda/places.cuh"

namespace ep {

// The last warps copy the least of a row with most hidden sizes.
inline constexpr int kNoteWarp = kThreads / 32 - 1;
__device__ __forceinline__ int this_warp() { return static_cast<int>(threadIdx.x / 32); }

enum class Pulled { kMessage, kNothing, kGaveUp };

// A thread's vectors of one pass over a message by kWide threads, as last seen.
template <int U, int kWide>
struct Look {
    ptx::Vector v[U];

    static __device__ __forceinline__ int vector(int base, int u) {
        return base + u * kWide + static_cast<int>(threadIdx.x % kWide);
    }

    __device__ __forceinline__ void load(const uint8_t* slot, int base, int num_vectors) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = vector(base, u);
            if (i < num_vectors) v[u] = ptx::load_line_vector(slot + 16 * i);
        }
    }
    __device__ __forceinline__ Missing missing(const uint8_t* slot, int base, int num_vectors,
                                               int source, uint64_t epoch) const {
        Missing missing{false, source, epoch, 0, nullptr};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = vector(base, u);
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
            const int i = vector(base, u);
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
                                            uint64_t epoch, RecvScratch scratch,
                                            Look<U, kThreads>& look, bool looked) {
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

// Copies the message in shared memory to every place it has here. All threads: each reads a vector
// of the row, or a word of the scales, and stores it once for each of our experts.
__device__ __forceinline__ void copy_message(const View& view, const RecvTarget& target,
                                             const uint8_t* message, const Placed& placed) {
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
        for (unsigned left = placed.has_row; left != 0; left &= left - 1) {
            const int k = __ffs(left) - 1;
            const int to = __shfl_sync(kFullWarp, placed.row, k);
            const int first = __shfl_sync(kFullWarp, placed.first_scale, k);
            if (is_row) row_to[static_cast<int64_t>(to) * view.row_vectors] = piece;
            if (is_scale) word_to[first] = word;
        }
    }
}

__device__ __forceinline__ void fan_out(const View& view, const RecvTarget& target, int source,
                                        int slot, RecvScratch scratch) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(scratch.message);
    const Placed placed = place_message(view, target, source, slot, bytes, scratch);
    copy_message(view, target, bytes, placed);
    if (this_warp() == kNoteWarp) note_rows(view, target, source, slot, bytes, placed);
}

// Compact: rows past the last message choose no expert. CTA `index` of the `ctas` that do it.
__device__ inline void clear_unused_rows(const View& view, const RecvTarget& target,
                                         int num_messages, int index, int ctas) {
    const int topk = view.topk;
    const int64_t end = static_cast<int64_t>(view.max_messages) * topk;
    const int64_t step = static_cast<int64_t>(ctas) * kThreads;
    int64_t i = static_cast<int64_t>(num_messages) * topk + index * kThreads + threadIdx.x;
#pragma unroll 1
    for (; i < end; i += step) target.topk_idx[i] = -1;
}

// One warp.
__device__ inline void note_received(const View& view, RecvScratch scratch) {
    const int lane = threadIdx.x & 31;
    int rows = 0;
#pragma unroll 1
    for (int i = lane; i < view.num_experts; i += 32) rows += scratch.rows[i];
    rows = __reduce_add_sync(kFullWarp, rows);
    if (lane != 0) return;
    add_statistic(view.stats->messages_received, messages_before(view.num_ranks, scratch));
    add_statistic(view.stats->rows_received, rows);
}

// CTA 0: what came, to the caller and to the statistics. False: gave up.
__device__ __forceinline__ bool keep_books(const View& view, const RecvTarget& target, Turn turn,
                                           RecvScratch scratch) {
    const bool ok = pull_counts(view, target, turn, scratch, [] {});
    // A first look, while others still wait for counts.
    uint32_t& readers = view.state->dispatch_readers;
    const bool have_read = this_warp() == kNoteWarp && all_have_read(readers);
    if (__syncthreads_or(!ok)) return false;
    report_counts(view, target, scratch);
    if (target.format == Format::kContiguous) place_experts(view, target, scratch);
    if (this_warp() == kNoteWarp) {
        advance(view.state->dispatched, readers, turn.epoch, have_read);
    } else if (this_warp() == kNoteWarp - 1) {
        note_received(view, scratch);
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
    Look<U, kThreads> look;
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

// The whole grid, at least two CTAs, behind prepare_recv. CTAs between the first and number
// `first_receiver` only report. `receive`: the rows, in the others but CTA 0; false: gave up.
template <class Receive>
__device__ __forceinline__ void dispatch_recv(const View& view, const RecvTarget& target,
                                              const Turn& turn, RecvScratch scratch,
                                              int first_receiver, Receive receive) {
    if (turn.absent.maybe != 0) clear_absent(view, turn.absent, scratch);
    report_epoch_read<kThreads>(this_warp() == kNoteWarp, (threadIdx.x & 31) == 0,
                                view.state->dispatch_readers, turn.epoch);
    const int receiver = static_cast<int>(blockIdx.x) - first_receiver;
    bool ok = false;
    if (blockIdx.x == 0) {
        ok = keep_books(view, target, turn, scratch);
    } else if (receiver >= 0) {
        ok = receive();
    }
    if (ok && target.format == Format::kCompact) {
        clear_unused_rows(view, target, messages_before(view.num_ranks, scratch),
                          max(0, receiver + 1), static_cast<int>(gridDim.x) - first_receiver + 1);
    }
}
__device__ __forceinline__ void dispatch_recv(const View& view, const RecvTarget& target,
                                              const Turn& turn, RecvScratch scratch) {
    dispatch_recv(view, target, turn, scratch, 1,
                  [&] { return receive_rows(view, target, turn, scratch); });
}

}  // namespace ep

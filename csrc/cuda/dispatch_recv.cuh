// Dispatch, second half: each message is pulled out of the inbox and fanned out to its local
// experts.
//
// Order of rows: by source rank, then by token. Nothing depends on arrival order or on the grid.
// CTA b takes slot b / R of source b % R, then the slot gridDim.x further on: known before any
// count has arrived, so that counts and rows are waited for together.
#pragma once

#include "cuda/counts.cuh"

namespace ep {

enum class Pulled { kMessage, kNothing, kGaveUp };

// Waits for the message in a slot, or for the news that the source sends fewer. Lays it out flat in
// shared memory. Warp by warp; the caller synchronises.
template <int U>
__device__ inline Pulled pull_slot(const View& view, Watch& watch, int source, int slot,
                                   uint64_t epoch, RecvScratch scratch) {
    const int num_vectors = view.message_vectors;
    const uint8_t* from = view.dispatch_in + static_cast<int64_t>(source * view.max_tokens + slot) *
                                                 view.message_stride;
    const bool tag_lane = holds_tag(threadIdx.x);
#pragma unroll 1
    for (int base = 0; base < num_vectors; base += U * kThreads) {
        ptx::Vector v[U];
        while (true) {
            Missing missing{false, source, epoch, 0, nullptr};
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int i = base + u * kThreads + threadIdx.x;
                if (i < num_vectors) v[u] = ptx::load_line_vector(from + 16 * i);
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int i = base + u * kThreads + threadIdx.x;
                if (i < num_vectors && tag_lane && v[u].hi != epoch) {
                    missing.waiting = true;
                    missing.seen = v[u].hi;
                    missing.at = from + 16 * i;
                }
            }
            if (!__any_sync(kFullWarp, missing.waiting)) break;
            const int32_t announced = messages_so_far(source, scratch);
            if (slot >= announced) return Pulled::kNothing;
            // Once announced it will come; until then both must be watched.
            const bool patient = announced != RecvScratch::kUnknown;
            if (patient ? !wait_for_more(watch, missing) : watch.give_up(missing)) {
                return Pulled::kGaveUp;
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads + threadIdx.x;
            if (i >= num_vectors) continue;
            const int g = first_granule(i);
            scratch.message[g] = v[u].lo;
            if (!holds_tag(i)) scratch.message[g + 1] = v[u].hi;
        }
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
                                 int row, const Entry& entry) {
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
    RowRef* refs = view.refs + static_cast<int64_t>(source * view.max_tokens + slot) * view.topk;
    const int index = __popc(has_row & ((1u << lane) - 1));
    const float weight = target.format == Format::kCompact ? 1.0f : entry.weight;
    if (row >= 0) refs[index] = {row, weight};
    if (lane == 0 && __popc(has_row) < topk) refs[__popc(has_row)] = {-1, 0.0f};
}

// Calls `put` with every row that a lane of the warp holds, in k order. Whole warps.
template <class Put>
__device__ __forceinline__ void for_each_row(unsigned has_row, int row, Put put) {
#pragma unroll 1
    for (unsigned left = has_row; left != 0; left &= left - 1) {
        put(__shfl_sync(kFullWarp, row, __ffs(left) - 1));
    }
}

// Copies the message in shared memory to every place it has here. All threads.
__device__ inline void fan_out(const View& view, const RecvTarget& target, int source, int slot,
                               RecvScratch scratch) {
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

    // A thread reads its piece once and stores it once for each of our experts.
    auto* out = reinterpret_cast<uint4*>(target.x);
#pragma unroll 1
    for (int base = 0; base < view.row_vectors; base += kThreads) {
        const int i = base + threadIdx.x;
        const bool mine = i < view.row_vectors;
        const uint4 piece =
            mine ? reinterpret_cast<const uint4*>(bytes + view.row_offset)[i] : uint4{};
        for_each_row(has_row, row, [&](int64_t to) {
            if (mine) out[to * view.row_vectors + i] = piece;
        });
    }
    // The last warp has copied the least with most hidden sizes: it takes the scales.
    const auto* scales = reinterpret_cast<const float*>(bytes + view.scales_offset);
    const bool takes_scales = threadIdx.x >= kThreads - 32;
#pragma unroll 1
    for (int i = lane; takes_scales && i - lane < view.num_scales; i += 32) {
        const float scale = i < view.num_scales ? scales[i] : 0.0f;
        for_each_row(has_row, row, [&](int64_t to) {
            if (i < view.num_scales) target.scales[to * view.num_scales + i] = scale;
        });
    }
    if (threadIdx.x < 32) note_rows(view, target, source, slot, row, entry);
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

__device__ inline void finish_dispatch(const View& view, uint64_t epoch, RecvScratch scratch) {
    StepStats* stats = view.stats;
    const int lane = threadIdx.x;
    int rows = 0;
#pragma unroll 1
    for (int i = lane; i < view.num_experts; i += 32) rows += scratch.rows[i];
    rows = __reduce_add_sync(kFullWarp, rows);
    if (lane != 0) return;
    stats->messages_received += messages_before(view.num_ranks, scratch);
    stats->rows_received += rows;
    view.state->dispatched = epoch;  // combine reads it, a kernel boundary later
}

// The whole grid.
__device__ inline void dispatch_recv(const View& view, const RecvTarget& target, uint64_t epoch,
                                     uint8_t* smem) {
    const RecvScratch scratch = RecvScratch::carve(smem, view);
#pragma unroll 1
    for (int s = threadIdx.x; s < view.num_ranks; s += kThreads) {
        scratch.messages[s] = RecvScratch::kUnknown;
    }
    __syncthreads();
    bool ok = pull_counts(view, epoch, scratch);
    Watch watch{view, Op::kDispatch};
    bool counted = false;
#pragma unroll 1
    for (int item = blockIdx.x;; item += gridDim.x) {
        const int slot = view.by_ranks(item);
        const int source = item - slot * view.num_ranks;
        Pulled pulled = Pulled::kNothing;
        if (ok && slot < view.max_tokens) {
            pulled = pull_slot<2>(view, watch, source, slot, epoch, scratch);
        }
        if (__syncthreads_or(!ok || pulled == Pulled::kGaveUp)) return;
        if (!counted) {  // the barrier above made every source's counts visible
            if (blockIdx.x == 0) report_counts(view, target, scratch);
            if (target.format == Format::kContiguous) place_experts(view, target, scratch);
            counted = true;
        }
        if (slot < scratch.messages[source]) {
            fan_out(view, target, source, slot, scratch);
        }
        int most = 0;
#pragma unroll 1
        for (int s = 0; s < view.num_ranks; ++s) most = max(most, scratch.messages[s]);
        if (item + static_cast<int>(gridDim.x) >= most * view.num_ranks) break;
        __syncthreads();  // the message buffer is free again
    }
    if (target.format == Format::kCompact) {
        clear_unused_rows(view, target, messages_before(view.num_ranks, scratch));
    }
    if (blockIdx.x == 0 && threadIdx.x < 32) finish_dispatch(view, epoch, scratch);
}

}  // namespace ep

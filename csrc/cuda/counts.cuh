// The receiver's view of what comes: counts of every source in shared memory, and what follows from
// them.
#pragma once

#include "cuda/lines.cuh"

namespace ep {

// Shared memory: room for messages | rows[R][L] | messages[R] | first_row[L + 1].
struct RecvScratch {
    uint64_t* message;
    int32_t* rows;  // that source s sends for local expert x
    int32_t* messages;  // that source s sends; kUnknown until its counts are here
    int32_t* first_row;  // contiguous: first row of the expert

    static constexpr int32_t kUnknown = 0x7fffffff;

    static EP_HD int bytes(const View& view, int room) {
        return room + 4 * (view.num_experts + view.num_ranks + view.local_experts + 1);
    }
    static __device__ __forceinline__ RecvScratch carve(uint8_t* smem, const View& view, int room) {
        auto* words = reinterpret_cast<int32_t*>(smem + room);
        return {reinterpret_cast<uint64_t*>(smem), words, words + view.num_experts,
                words + view.num_experts + view.num_ranks};
    }
};

// All threads.
__device__ __forceinline__ void prepare_recv(const View& view, RecvScratch scratch) {
#pragma unroll 1
    for (int s = threadIdx.x; s < view.num_ranks; s += kThreads) {
        scratch.messages[s] = RecvScratch::kUnknown;
    }
}

// All threads: ranks that are left out send nothing. Warps that already wait for a message of
// theirs see it; the rest is read behind a barrier.
__device__ __noinline__ inline void clear_absent(const View& view, Absent absent,
                                                 RecvScratch scratch) {
#pragma unroll 1
    for (int e = threadIdx.x; e < view.num_experts; e += kThreads) {
        if (absent.has(view, view.owner_of(e))) scratch.rows[e] = 0;
    }
#pragma unroll 1
    for (int s = threadIdx.x; s < view.num_ranks; s += kThreads) {
        if (absent.has(view, s)) atomicExch(&scratch.messages[s], 0);
    }
}

// A peer's numbers index our memory: never beyond the inbox.
__device__ __forceinline__ int32_t checked_count(const View& view, int source, uint32_t n) {
    const auto limit = static_cast<uint32_t>(view.max_tokens);
    if (n <= limit) return static_cast<int32_t>(n);
    if (blockIdx.x == 0) fail(view, FaultCode::kCount, Op::kDispatch, source, limit, n);
    return static_cast<int32_t>(limit);
}

// Every source must work with this rank's mask. A difference ends the group: every wait that may
// not be served ends with it.
__device__ __forceinline__ void compare_masks(const View& view, const Turn& turn, int source,
                                              uint32_t theirs) {
    const uint32_t ours = turn.absent.digest(view);
    if (theirs == ours || blockIdx.x != 0) return;
    fail(view, FaultCode::kTerms, Op::kDispatch, source, pack_terms(ours, Wire::kBf16),
         pack_terms(theirs, Wire::kBf16));
}

// All counts messages into shared memory; those of ranks that are left out are zeros already. Each
// warp takes 32 vectors of one source at a time, and publishes the number of messages for the warps
// that already wait for rows. `meanwhile` runs once, between the first arrival (or at once, in
// warps with nothing to pull) and what follows from it. False: gave up.
template <class Meanwhile>
__device__ __forceinline__ bool pull_counts(const View& view, const RecvTarget& target,
                                            const Turn& turn, RecvScratch scratch,
                                            Meanwhile meanwhile) {
    const uint64_t epoch = turn.epoch;
    const int local_experts = view.local_experts;
    const int num_vectors = view.counts_vectors;
    const uint8_t* slots = view.counts_in + (epoch & 1) * view.num_ranks * view.counts_stride;
    const int chunks = (num_vectors + 31) / 32;
    const int lane = threadIdx.x & 31;
    const uint64_t start = blockIdx.x == 0 ? ptx::global_timer_ns() : 0;
    Watch watch{view, Op::kDispatch};
    bool told = false;
#pragma unroll 1
    for (int source = 0, task = threadIdx.x / 32; task < view.num_ranks * chunks;
         task += kThreads / 32) {
        while (task >= (source + 1) * chunks) ++source;
        const int i = (task - source * chunks) * 32 + lane;
        const bool asked = i < num_vectors && !turn.absent.has(view, source);
        const uint8_t* from[1] = {asked ? slots + source * view.counts_stride + 16 * i : nullptr};
        const int peers[1] = {source};
        ptx::Vector v[1];
        if (!await_vectors<1>(watch, from, peers, holds_tag(lane), epoch, v)) return false;
        if (!told) meanwhile();
        told = true;
        if (blockIdx.x == 0 && asked && i == 0) {
            const uint64_t waited = ptx::global_timer_ns() - start;
            view.stats->wait_ns[source] = waited;
            if (target.wait_ns != nullptr) target.wait_ns[source] += waited;
        }
        if (from[0] == nullptr) continue;
        const auto put = [&](int g, uint64_t granule) {
            const int x = 2 * g - 2;
            const auto lo = static_cast<uint32_t>(granule);
            if (g == 0) {
                compare_masks(view, turn, source, static_cast<uint32_t>(granule >> 32));
                atomicExch(&scratch.messages[source], checked_count(view, source, lo));
                return;
            }
            int32_t* rows = scratch.rows + source * local_experts;
            if (x < local_experts) rows[x] = checked_count(view, source, lo);
            const auto hi = static_cast<uint32_t>(granule >> 32);
            if (x + 1 < local_experts) rows[x + 1] = checked_count(view, source, hi);
        };
        put(first_granule(i), v[0].lo);
        if (!holds_tag(i)) put(first_granule(i) + 1, v[0].hi);
    }
    if (!told) meanwhile();
    return true;
}

// What the warps that pull counts have published so far. An atomic: they may be writing it now.
__device__ __forceinline__ int32_t messages_so_far(int source, RecvScratch scratch) {
    int32_t n = 0;
    if ((threadIdx.x & 31) == 0) n = atomicOr(&scratch.messages[source], 0);
    return __shfl_sync(kFullWarp, n, 0);
}

// Batched: which rows of local expert x came from which source.
__device__ __noinline__ inline void note_ranges(const View& view, const RecvTarget& target, int x,
                                                RecvScratch scratch) {
    int64_t first = 0;
#pragma unroll 1
    for (int s = 0; s < view.num_ranks; ++s) {
        const int32_t rows = scratch.rows[s * view.local_experts + x];
        target.layout_range[x * view.num_ranks + s] = (first << 32) | rows;
        first += rows;
    }
}

// CTA 0 tells the caller what came.
__device__ inline void report_counts(const View& view, const RecvTarget& target,
                                     RecvScratch scratch) {
    const int local_experts = view.local_experts;
#pragma unroll 1
    for (int x = threadIdx.x; x < local_experts; x += kThreads) {
        int32_t sum = 0;
#pragma unroll 1
        for (int s = 0; s < view.num_ranks; ++s) sum += scratch.rows[s * local_experts + x];
        target.recv_count[x] = sum;
        if (target.cumulative_count != nullptr) target.cumulative_count[x] += sum;
        if (target.layout_range != nullptr) note_ranges(view, target, x, scratch);
    }
#pragma unroll 1
    for (int s = threadIdx.x; s < view.num_ranks; s += kThreads) {
        target.routing.received[s] = scratch.messages[s];
        target.num_messages[s] = scratch.messages[s];
    }
}

// Contiguous: the first row of every expert, each a multiple of the alignment. Synchronises.
__device__ __noinline__ inline void place_experts(const View& view, const RecvTarget& target,
                                                  RecvScratch scratch) {
    const int local_experts = view.local_experts;
    const int lane = threadIdx.x & 31;
    if (threadIdx.x < 32) {
        int32_t carried = 0;
#pragma unroll 1
        for (int base = 0; base < local_experts; base += 32) {
            const int x = base + lane;
            int32_t own = 0;
#pragma unroll 1
            for (int s = 0; s < view.num_ranks && x < local_experts; ++s) {
                own += scratch.rows[s * local_experts + x];
            }
            own = static_cast<int32_t>(round_up(own, target.alignment));
            int32_t sum = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int32_t other = __shfl_up_sync(kFullWarp, sum, step);
                if (lane >= step) sum += other;
            }
            if (x < local_experts) scratch.first_row[x] = carried + sum - own;
            carried += __shfl_sync(kFullWarp, sum, 31);
        }
        if (lane == 0) scratch.first_row[local_experts] = carried;
    }
    __syncthreads();
    if (blockIdx.x != 0) return;
#pragma unroll 1
    for (int x = threadIdx.x; x <= local_experts; x += kThreads) {
        target.expert_offset[x] = scratch.first_row[x];
    }
}

__device__ __forceinline__ int messages_before(int source, RecvScratch scratch) {
    int sum = 0;
#pragma unroll 1
    for (int s = 0; s < source; ++s) sum += scratch.messages[s];
    return sum;
}

}  // namespace ep

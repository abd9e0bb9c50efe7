// Notify, all CTAs but the first: each token's place among those that go to the same rank.
#pragma once

#include "cuda/normal_steps.cuh"

namespace ep::normal {

// Tokens before `tokens` that go to each rank; whole CTAs. Each thread stays with one rank's
// column.
__device__ __forceinline__ void count_earlier(const NotifyArgs& a, int64_t tokens,
                                              int32_t* earlier) {
    constexpr int kInFlight = 16;
    const int num_ranks = a.group.num_ranks();
    for (int r = threadIdx.x; r < num_ranks; r += kCountThreads) earlier[r] = 0;
    __syncthreads();
    const int step = kCountThreads / num_ranks * num_ranks;
    const int first = static_cast<int>(threadIdx.x);
    const int64_t end = tokens * num_ranks;
    if (first < step) {
        int32_t count = 0;
#pragma unroll 1
        for (int64_t base = first; base < end; base += kInFlight * step) {
            // Also the last few are in flight together: a loop over them would wait for each.
            bool goes[kInFlight];
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const int64_t i = base + j * step;
                goes[j] = i < end && a.layout.is_token_in_rank[i] != 0;
            }
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) count += goes[j];
        }
        if (count != 0) atomicAdd(&earlier[first % num_ranks], count);
    }
    __syncthreads();
}

// One lane: a layout that announces other than what its tokens are would leave peers with rows that
// never come.
__device__ __forceinline__ void check_announced(const NotifyArgs& a, int rank, int32_t tokens) {
    const int32_t announced = a.layout.tokens_per_rank[rank];
    if (announced == tokens) return;
    fail(a.group.waits, FaultCode::kCount, Op::kNormalNotify, a.group.rank(),
         static_cast<uint64_t>(tokens), static_cast<uint32_t>(announced));
}

// Where no CTA has tokens to place.
__device__ __forceinline__ void check_no_tokens(const NotifyArgs& a) {
#pragma unroll 1
    for (int r = threadIdx.x; r < a.group.num_ranks(); r += kCountThreads) check_announced(a, r, 0);
}

// The other CTAs: a stretch of tokens each, a warp a rank.
__device__ __forceinline__ void place_tokens(const NotifyArgs& a, int32_t* earlier) {
    constexpr int kInFlight = 8;
    const int num_ranks = a.group.num_ranks();
    const int64_t begin = static_cast<int64_t>(blockIdx.x - 1) * a.stretch;
    const int64_t end = min(a.num_tokens, static_cast<int>(begin) + a.stretch);
    if (begin >= end) return;
    count_earlier(a, begin, earlier);
#pragma unroll 1
    for (int r = warp_of(); r < num_ranks; r += kCountThreads / 32) {
        int32_t position = earlier[r];
#pragma unroll 1
        for (int64_t base = begin; base < end; base += 32 * kInFlight) {
            bool goes[kInFlight];
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const int64_t token = base + 32 * j + lane_of();
                goes[j] = token < end && a.layout.is_token_in_rank[token * num_ranks + r] != 0;
            }
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const int64_t token = base + 32 * j + lane_of();
                const unsigned who = __ballot_sync(kFullWarp, goes[j]);
                const int before = __popc(who & ((1u << lane_of()) - 1));
                if (token < end) {
                    a.tables.send_position[token * num_ranks + r] =
                        goes[j] ? position + before : -1;
                }
                position += __popc(who);
            }
        }
        if (end == a.num_tokens && lane_of() == 0) check_announced(a, r, position);
    }
}

}  // namespace ep::normal

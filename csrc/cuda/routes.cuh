// Who goes where: reading topk_idx, and counting what earlier tokens of this rank chose.
#pragma once

#include "cuda/watch.cuh"

namespace ep {

// Counts over a prefix of this rank's tokens, in shared memory.
struct RouteCounts {
    int32_t* rows;      // [E] tokens that chose the expert
    int32_t* messages;  // [R] tokens that go to the rank
};

// One entry of a token, held by one lane.
struct Choice {
    int expert;          // valid entries: 0 <= expert < E; else -1
    bool dropped;        // out of range, or the token's second mention of the expert
    bool leads_message;  // first of the token's entries that goes to its rank
};

// The lanes [first_lane, first_lane + topk) look at one token, in k order. Whole warps call it.
__device__ __noinline__ inline Choice read_choice(const Context& ctx, const SendInput& in, bool active,
                                              int first_lane, int64_t entry) {
    const int lane = threadIdx.x & 31;
    const int raw = active ? in.expert(entry) : -1;
    const bool in_range = raw >= 0 && raw < ctx.shape.num_experts;
    const int rank = in_range ? ctx.owner_of(raw) : -1;
    bool repeated = false;  // an earlier lane has the same expert
    bool follows = false;   // an earlier lane goes to the same rank
#pragma unroll 4
    for (int k = 0; k < ctx.shape.topk; ++k) {
        const int other = __shfl_sync(kFullWarp, raw, first_lane + k);
        const int other_rank = __shfl_sync(kFullWarp, rank, first_lane + k);
        const bool earlier = first_lane + k < lane;
        repeated |= earlier && other == raw;
        follows |= earlier && other_rank == rank;
    }
    const bool valid = in_range && !repeated;
    return {valid ? raw : -1, active && raw != -1 && !valid, valid && !follows};
}

// One token's entries in a warp, entry k at lane k.
struct TokenRoute {
    Choice choice;
    float weight;

    static __device__ __forceinline__ TokenRoute read(const Context& ctx, const SendInput& in,
                                                      int token) {
        const int lane = threadIdx.x & 31;
        const int topk = ctx.shape.topk;
        const bool active = lane < topk;
        const int64_t entry = static_cast<int64_t>(token) * topk + lane;
        return {read_choice(ctx, in, active, 0, entry), active ? in.weights[entry] : 0.0f};
    }
};

__device__ __forceinline__ void clear_counts(const Shape& shape, RouteCounts counts) {
#pragma unroll 1
    for (int i = threadIdx.x; i < shape.num_experts; i += blockDim.x) counts.rows[i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < shape.num_ranks; i += blockDim.x) counts.messages[i] = 0;
}

// Adds tokens [0, end) to cleared counts; all warps of the CTA, the caller synchronises.
// Sums of integers: the order of the atomics does not show.
__device__ __forceinline__ void count_tokens(const Context& ctx, const SendInput& in, int end,
                                             RouteCounts counts) {
    const int lane = threadIdx.x & 31;
    const int topk = ctx.shape.topk;
    const int tokens_per_warp = ctx.by_topk(32);
    const int group = ctx.by_topk(lane);
    const bool in_group = group < tokens_per_warp;
    const int num_warps = blockDim.x / 32;
#pragma unroll 1
    for (int t = (threadIdx.x / 32) * tokens_per_warp; t < end; t += num_warps * tokens_per_warp) {
        const bool active = in_group && t + group < end;
        const int64_t entry = static_cast<int64_t>(t) * topk + lane;
        const Choice c = read_choice(ctx, in, active, group * topk, entry);
        if (c.expert >= 0) atomicAdd(&counts.rows[c.expert], 1);
        if (c.leads_message) atomicAdd(&counts.messages[ctx.owner_of(c.expert)], 1);
    }
}

}  // namespace ep

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

// Lanes with equal `group` look at the same token, in k order. Whole warps call it.
__device__ __forceinline__ Choice read_choice(const Shape& shape, const SendInput& in, bool active,
                                              int group, int64_t entry) {
    const int lane = threadIdx.x & 31;
    const int raw = active ? in.expert(entry) : -1;
    const bool in_range = raw >= 0 && raw < shape.num_experts;
    const unsigned earlier = (1u << lane) - 1;
    // Lanes with nothing to say get keys of their own.
    const int idle_key = -1 - lane;
    const int expert_key = in_range ? (group << 16) + raw : idle_key;
    const bool repeated = (__match_any_sync(kFullWarp, expert_key) & earlier) != 0;
    const bool valid = in_range && !repeated;
    const int rank_key = valid ? (group << 16) + shape.owner_of(raw) : idle_key;
    const bool first = (__match_any_sync(kFullWarp, rank_key) & earlier) == 0;
    return {valid ? raw : -1, active && raw != -1 && !valid, valid && first};
}

__device__ __forceinline__ void clear_counts(const Shape& shape, RouteCounts counts) {
    for (int i = threadIdx.x; i < shape.num_experts; i += blockDim.x) counts.rows[i] = 0;
    for (int i = threadIdx.x; i < shape.num_ranks; i += blockDim.x) counts.messages[i] = 0;
}

// Adds tokens [0, end) to cleared counts; all warps of the CTA, the caller synchronises.
// Sums of integers: the order of the atomics does not show.
__device__ __forceinline__ void count_tokens(const Shape& shape, const SendInput& in, int end,
                                             RouteCounts counts) {
    const int lane = threadIdx.x & 31;
    const int tokens_per_warp = 32 / shape.topk;
    const int group = lane / shape.topk;
    const bool in_group = group < tokens_per_warp;
    const int num_warps = blockDim.x / 32;
    for (int t = (threadIdx.x / 32) * tokens_per_warp; t < end; t += num_warps * tokens_per_warp) {
        const bool active = in_group && t + group < end;
        const int64_t entry = static_cast<int64_t>(t) * shape.topk + lane;
        const Choice c = read_choice(shape, in, active, group, entry);
        if (c.expert >= 0) atomicAdd(&counts.rows[c.expert], 1);
        if (c.leads_message) atomicAdd(&counts.messages[shape.owner_of(c.expert)], 1);
    }
}

}  // namespace ep

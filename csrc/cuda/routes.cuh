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
    int rank;            // its owner
    bool dropped;        // out of range, or the token's second mention of the expert
    bool leads_message;  // first of the token's entries that goes to its rank
};

// What an entry (k of its token) learns from an earlier one of the same token. Both facts about an
// entry travel in one word: its rank above, its expert below; -1 where the expert is out of range.
struct EntryCheck {
    int raw;
    int rank;
    int key;
    bool repeated = false;
    bool follows = false;

    __device__ __forceinline__ EntryCheck(const View& view, int raw_expert) : raw(raw_expert) {
        const bool in_range = raw >= 0 && raw < view.num_experts;
        rank = view.owner_of(in_range ? raw : 0);
        key = in_range ? rank << 16 | raw : -1;
    }
    __device__ __forceinline__ void compare(int other, bool is_earlier) {
        repeated |= is_earlier && other == key;
        follows |= is_earlier && other >> 16 == rank;
    }
    __device__ __forceinline__ Choice choice() const {
        const bool valid = key >= 0 && !repeated;
        return {valid ? raw : -1, rank, raw != -1 && !valid, valid && !follows};
    }
};

// Out of line: rare, and long.
__device__ __noinline__ inline Choice check_many(const View& view, int raw, int first_lane) {
    EntryCheck check(view, raw);
    const int k = static_cast<int>(threadIdx.x & 31) - first_lane;
#pragma unroll 4
    for (int j = 0; j < view.topk - 1; ++j) {
        check.compare(__shfl_sync(kFullWarp, check.key, first_lane + j), j < k);
    }
    return check.choice();
}

// Lanes [first_lane, first_lane + topk) hold one token's raw entries, in k order; others -1. Whole
// warps.
__device__ __forceinline__ Choice check_choice(const View& view, int raw, int first_lane) {
    constexpr int kUsualTopk = 8;
    if (view.topk > kUsualTopk) return check_many(view, raw, first_lane);
    EntryCheck check(view, raw);
    const int k = static_cast<int>(threadIdx.x & 31) - first_lane;
#pragma unroll
    for (int j = 0; j < kUsualTopk - 1; ++j) {
        check.compare(__shfl_sync(kFullWarp, check.key, first_lane + j), j < k);
    }
    return check.choice();
}

// All threads.
__device__ __forceinline__ void clear_counts(const View& view, RouteCounts counts) {
#pragma unroll 1
    for (int i = threadIdx.x; i < view.num_experts; i += kThreads) counts.rows[i] = 0;
#pragma unroll 1
    for (int r = threadIdx.x; r < view.num_ranks; r += kThreads) counts.messages[r] = 0;
}

// Adds tokens [0, end) to cleared counts; all warps of the CTA, the caller synchronises. A warp
// takes as many tokens as fit its lanes, and loads two such groups at once. (Sums of integers: the
// order of the atomics does not show.)
__device__ __forceinline__ void count_tokens(const View& view, const SendInput& in, Absent absent,
                                             int end, RouteCounts counts) {
    constexpr int kInFlight = 2;
    const int lane = threadIdx.x & 31;
    const int group_tokens = view.by_topk(32);
    const int group = view.by_topk(lane);
    const int step = kThreads / 32 * group_tokens;
#pragma unroll 1
    for (int t = (threadIdx.x / 32) * group_tokens; t < end; t += kInFlight * step) {
        int raw[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int base = t + j * step;
            const bool active = group < group_tokens && base + group < end;
            raw[j] = active ? in.expert(static_cast<int64_t>(base) * view.topk + lane) : -1;
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const Choice c = check_choice(view, absent.reachable(view, raw[j]), group * view.topk);
            if (c.expert >= 0) atomicAdd(&counts.rows[c.expert], 1);
            if (c.leads_message) atomicAdd(&counts.messages[c.rank], 1);
        }
    }
}

}  // namespace ep

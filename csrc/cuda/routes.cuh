// Who goes where: reading topk_idx, and counting what earlier tokens of this rank chose.
#pragma once

#include "cuda/watch.cuh"

namespace ep {

inline constexpr int kFewTokens = 128;  // counting them by lanes would leave most warps idle
inline constexpr int kUsualTopk = 8;  // and fewer: the straight path

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

// One lane a token, where no rank is left out and choices are few. (Sums of integers: the order of
// the atomics does not show.)
template <class Index>
__device__ __forceinline__ void count_by_lanes(const View& view, const Index* topk_idx, int end,
                                               RouteCounts counts) {
    const int topk = view.topk;
#pragma unroll 1
    for (int t = threadIdx.x; t < end; t += kThreads) {
        const Index* from = topk_idx + static_cast<int64_t>(t) * topk;
        Index index[kUsualTopk];
#pragma unroll
        for (int k = 0; k < kUsualTopk; ++k) index[k] = k < topk ? from[k] : Index{-1};
        int raw[kUsualTopk];
        int rank[kUsualTopk];  // as in EntryCheck, the lane's own entries side by side
#pragma unroll
        for (int k = 0; k < kUsualTopk; ++k) {
            const bool in_range = index[k] >= 0 && index[k] < view.num_experts;
            raw[k] = in_range ? static_cast<int>(index[k]) : -1;
            rank[k] = in_range ? view.owner_of(raw[k]) : -1;
            bool repeated = false, follows = false;
#pragma unroll
            for (int j = 0; j < k; ++j) {
                repeated |= raw[j] == raw[k];
                follows |= rank[j] == rank[k];
            }
            ptx::count_if(in_range && !repeated, counts.rows + raw[k]);
            ptx::count_if(in_range && !follows, counts.messages + rank[k]);
        }
    }
}

// One lane an entry: a warp takes as many tokens as fit its lanes.
__device__ __forceinline__ void count_by_warps(const View& view, const SendInput& in, Absent absent,
                                               int end, RouteCounts counts) {
    const int lane = threadIdx.x & 31;
    const int group_tokens = view.by_topk(32);
    const int group = view.by_topk(lane);
#pragma unroll 1
    for (int t = (threadIdx.x / 32) * group_tokens; t < end; t += kThreads / 32 * group_tokens) {
        const bool active = group < group_tokens && t + group < end;
        const int raw = active ? in.expert(static_cast<int64_t>(t) * view.topk + lane) : -1;
        const Choice c = check_choice(view, absent.reachable(view, raw), group * view.topk);
        if (c.expert >= 0) atomicAdd(&counts.rows[c.expert], 1);
        if (c.leads_message) atomicAdd(&counts.messages[c.rank], 1);
    }
}

// Adds tokens [0, end) to cleared counts; all warps of the CTA, the caller synchronises.
__device__ __forceinline__ void count_tokens(const View& view, const SendInput& in, Absent absent,
                                             int end, RouteCounts counts) {
    if (end <= kFewTokens || view.topk > kUsualTopk || absent.maybe != 0) {
        count_by_warps(view, in, absent, end, counts);
    } else if (in.idx_bytes == 4) {
        count_by_lanes(view, static_cast<const int32_t*>(in.topk_idx), end, counts);
    } else {
        count_by_lanes(view, static_cast<const int64_t*>(in.topk_idx), end, counts);
    }
}

}  // namespace ep

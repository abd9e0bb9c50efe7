// Who goes where: reading topk_idx, and counting what earlier tokens of this rank chose.
#pragma once

#include "cuda/watch.cuh"

namespace ep {

inline constexpr int kFewTokens = 128;  // counting them by lanes would leave most warps idle
inline constexpr int kUsualTopk = 8;  // and fewer: the straight path

// Counts over a prefix of this rank's tokens, in shared memory: for every rank the words that it is
// told (CountsLayout).
struct RouteCounts {
    int32_t* words;  // [R][counts_words]

    static EP_HD int num_words(const View& view) { return view.num_ranks * view.counts_words; }
    // Tokens that go to the rank.
    template <class AnyView>
    __device__ __forceinline__ int32_t* messages(const AnyView& view, int rank) const {
        return words + rank * view.counts_words + CountsLayout::kMessages;
    }
    // Tokens that chose the expert, which is the rank's.
    template <class AnyView>
    __device__ __forceinline__ int32_t* rows(const AnyView& view, int expert, int rank) const {
        return words + CountsLayout::kRows + expert + rank * view.counts_gap;
    }
};

// One entry of a token, held by one lane.
struct Choice {
    int expert;  // valid entries: 0 <= expert < E; else -1
    int rank;  // its owner
    bool dropped;  // out of range, or the token's second mention of the expert
    bool leads_message =
        false;  // first of its entries that goes to the rank; check_few says it of none
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

// One token of few entries, for a warp that has nothing else to do: lanes k, k + 8, k + 16 and
// k + 24 all hold raw entry k. Each compares it with two earlier ones, so that every pair is
// compared at once. The first lane of an entry learns of it, the others get none.
__device__ __forceinline__ Choice check_few(const View& view, int raw) {
    static_assert(kUsualTopk == 8);
    const int lane = threadIdx.x & 31;
    const int k = lane & 7;
    bool repeats = false;
#pragma unroll
    for (int before = 1; before < kUsualTopk; before += 4) {
        const int j = k - (lane >> 3) - before;
        const int other = __shfl_sync(kFullWarp, raw, j & 31);
        repeats |= j >= 0 && other == raw;
    }
    unsigned repeated = __ballot_sync(kFullWarp, repeats);
    repeated |= repeated >> 16;
    repeated |= repeated >> 8;
    const bool mine = lane < view.topk;
    const bool in_range = raw >= 0 && raw < view.num_experts;
    const bool valid = mine && in_range && (repeated >> k & 1) == 0;
    return {valid ? raw : -1, view.owner_of(in_range ? raw : 0), mine && raw != -1 && !valid};
}

// All threads.
__device__ __forceinline__ void clear_counts(const View& view, RouteCounts counts) {
#pragma unroll 1
    for (int i = threadIdx.x; i < RouteCounts::num_words(view); i += kThreads) counts.words[i] = 0;
}

// What counting needs of a view, by value: out of line a view lies behind a pointer, and everything
// of it would be loaded anew after each atomic.
struct CountingView {
    int32_t topk;
    int32_t num_experts;
    int32_t counts_words;
    int32_t counts_gap;
    FastDiv by_local_experts;

    static __device__ __forceinline__ CountingView of(const View& view) {
        return {view.topk, view.num_experts, view.counts_words, view.counts_gap,
                view.by_local_experts};
    }
};

// One lane a token, where no rank is left out and choices are few; out of line, since it is long.
// (Sums of integers: the order of the atomics does not show.)
template <class Index>
__device__ __noinline__ inline void count_by_lanes(CountingView view, const Index* topk_idx,
                                                   int end, RouteCounts counts) {
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
            rank[k] = in_range ? view.by_local_experts(raw[k]) : -1;
            bool repeated = false, follows = false;
#pragma unroll
            for (int j = 0; j < k; ++j) {
                repeated |= raw[j] == raw[k];
                follows |= rank[j] == rank[k];
            }
            ptx::count_if(in_range && !repeated, counts.rows(view, raw[k], rank[k]));
            ptx::count_if(in_range && !follows, counts.messages(view, rank[k]));
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
        if (c.expert >= 0) atomicAdd(counts.rows(view, c.expert, c.rank), 1);
        if (c.leads_message) atomicAdd(counts.messages(view, c.rank), 1);
    }
}

// One warp, of a checked token: does any of its entries go to number `base` + lane of the ranks?
// `number`: of the entry's own rank, in whatever order the caller has them.
__device__ __forceinline__ bool goes_to(const Choice& c, int number, int base) {
    const bool here = c.expert >= 0 && number >= base && number < base + 32;
    const unsigned going = __reduce_or_sync(kFullWarp, here ? 1u << (number - base) : 0);
    return (going >> (threadIdx.x & 31) & 1) != 0;
}

// One warp a token.
__device__ __forceinline__ void count_one_each(const View& view, const SendInput& in, Absent absent,
                                               int end, RouteCounts counts) {
    const int t = static_cast<int>(threadIdx.x / 32);
    const int lane = threadIdx.x & 31;
    const int k = lane & (kUsualTopk - 1);
    if (t >= end) return;
    const int raw = k < view.topk ? in.expert(static_cast<int64_t>(t) * view.topk + k) : -1;
    const Choice c = check_few(view, absent.reachable(view, raw));
    if (c.expert >= 0) atomicAdd(counts.rows(view, c.expert, c.rank), 1);
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        if (goes_to(c, c.rank, base)) atomicAdd(counts.messages(view, base + lane), 1);
    }
}

// Adds tokens [0, end) to cleared counts; all warps of the CTA, the caller synchronises.
__device__ __forceinline__ void count_tokens(const View& view, const SendInput& in, Absent absent,
                                             int end, RouteCounts counts) {
    if (end <= kThreads / 32 && view.topk <= kUsualTopk) {
        count_one_each(view, in, absent, end, counts);
    } else if (end <= kFewTokens || view.topk > kUsualTopk || absent.maybe != 0) {
        count_by_warps(view, in, absent, end, counts);
    } else if (in.idx_bytes == 4) {
        count_by_lanes(CountingView::of(view), static_cast<const int32_t*>(in.topk_idx), end,
                       counts);
    } else {
        count_by_lanes(CountingView::of(view), static_cast<const int64_t*>(in.topk_idx), end,
                       counts);
    }
}

}  // namespace ep

// Layout: how many tokens go where. Notify: ranks tell each other, and each token learns its place.
#pragma once

#include "cuda/lines.cuh"
#include "cuda/normal_places.cuh"

namespace ep::normal {

// The ranks of one token, a bit each.
struct RankSet {
    uint64_t low = 0;
    uint64_t high = 0;

    __device__ __forceinline__ void add(int r) {
        if (r < 64) {
            low |= 1ull << r;
        } else {
            high |= 1ull << (r - 64);
        }
    }
    __device__ __forceinline__ bool has(int r) const {
        return ((r < 64 ? low >> r : high >> (r - 64)) & 1) != 0;
    }
};

// What the CTAs have added up, by the last of them; what they added to is zero again.
__device__ __forceinline__ void take_sums(const LayoutArgs& a) {
    State& state = *a.group.state;
    const int num_experts = a.group.waits.num_experts;
    for (int i = threadIdx.x; i < num_experts; i += kCountThreads) {
        a.into.tokens_per_expert[i] = static_cast<int>(atomicExch(&state.tokens_per_expert[i], 0u));
    }
    for (int r = threadIdx.x; r < a.group.num_ranks(); r += kCountThreads) {
        a.into.tokens_per_rank[r] = static_cast<int>(atomicExch(&state.tokens_per_rank[r], 0u));
    }
    if (threadIdx.x == 0) state.tickets[kLayoutTicket] = 0;
}

// At least one CTA, a thread a token.
__device__ __forceinline__ void layout(const LayoutArgs& a, uint8_t* smem) {
    const Group& group = a.group;
    const int num_experts = group.waits.num_experts, num_ranks = group.num_ranks();
    auto* experts = reinterpret_cast<int32_t*>(smem);
    int32_t* ranks = experts + num_experts;
    for (int i = threadIdx.x; i < num_experts + num_ranks; i += kCountThreads) experts[i] = 0;
    __syncthreads();
    ptx::await_previous_kernel();
    ptx::allow_next_kernel();
    int dropped = 0;
    int64_t bad = 0;
    const int step = static_cast<int>(gridDim.x) * kCountThreads;
#pragma unroll 1
    for (int base = blockIdx.x * kCountThreads; base < a.num_tokens; base += step) {
        const int64_t token = base + static_cast<int>(threadIdx.x);
        const bool real = token < a.num_tokens;
        RankSet goes;
#pragma unroll 8
        for (int k = 0; k < (real ? a.routes.topk : 0); ++k) {
            const int64_t expert = a.routes.expert(token * a.routes.topk + k);
            if (expert == -1) continue;
            if (expert < 0 || expert >= num_experts) {
                if (dropped++ == 0) bad = expert;
                continue;
            }
            atomicAdd(&experts[expert], 1);
            goes.add(a.by_local_experts(static_cast<int>(expert)));
        }
#pragma unroll 1
        for (int r = 0; r < num_ranks; ++r) {
            if (real) a.into.is_token_in_rank[token * num_ranks + r] = goes.has(r) ? 1 : 0;
            const int count = __popc(__ballot_sync(kFullWarp, goes.has(r)));
            if (lane_of() == 0 && count > 0) atomicAdd(&ranks[r], count);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_experts; i += kCountThreads) {
        if (experts[i] != 0) {
            atomicAdd(&group.state->tokens_per_expert[i], static_cast<uint32_t>(experts[i]));
        }
    }
    for (int r = threadIdx.x; r < num_ranks; r += kCountThreads) {
        if (ranks[r] != 0) {
            atomicAdd(&group.state->tokens_per_rank[r], static_cast<uint32_t>(ranks[r]));
        }
    }
    const unsigned who = __ballot_sync(kFullWarp, dropped > 0);
    const int all = __reduce_add_sync(kFullWarp, dropped);
    if (who != 0 && lane_of() == __ffs(who) - 1) {
        record_routing(group.waits, all, bad, Op::kNormalDispatch);
    }
    __syncthreads();  // the CTA's additions come before its ticket
    bool last = false;
    if (threadIdx.x == 0) {
        last = ptx::add_acq_rel_gpu(&group.state->tickets[kLayoutTicket], 1u) == gridDim.x - 1;
    }
    if (__syncthreads_or(last) != 0) take_sums(a);
}

// A pair of words of the notify message for one rank: tokens to each rank [R], rows per expert [L].
__device__ __forceinline__ uint64_t notify_granule(const NotifyArgs& a, int dst, int g) {
    const int num_ranks = a.group.num_ranks();
    uint64_t pair = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int i = 2 * g + h, l = i - num_ranks;
        uint32_t word = 0;
        if (i < num_ranks) {
            word = static_cast<uint32_t>(a.layout.tokens_per_rank[i]);
        } else if (l < a.local_experts) {
            word = static_cast<uint32_t>(a.layout.tokens_per_expert[dst * a.local_experts + l]);
        }
        pair |= static_cast<uint64_t>(word) << (32 * h);
    }
    return pair;
}

__device__ __forceinline__ int notify_vectors(const NotifyArgs& a) {
    return lines_for(4LL * (a.group.num_ranks() + a.local_experts)) * kVectorsPerLine;
}

// CTA 0. Pairs with pull_counts of every rank.
__device__ __forceinline__ void push_counts(const NotifyArgs& a, uint64_t epoch) {
    const Group& group = a.group;
    const int vectors = notify_vectors(a);
#pragma unroll 1
    for (int i = threadIdx.x; i < group.num_ranks() * vectors; i += kCountThreads) {
        const int dst = i / vectors, v = i - dst * vectors;
        const int g = first_granule(v);
        const uint64_t hi = holds_tag(v) ? epoch : notify_granule(a, dst, g + 1);
        ptx::store_line_vector(group.notify_slot(dst, epoch, group.rank()) + 16 * v,
                               {notify_granule(a, dst, g), hi});
    }
}

// A peer's count indexes our memory: never more than a rank can have. False: recorded.
__device__ __forceinline__ bool take_count(const NotifyArgs& a, int source, int i, uint64_t word,
                                           int32_t* to) {
    to[i] = static_cast<int32_t>(word);
    const int limit = kMaxTokensPerRank * (i < a.group.num_ranks() ? 1 : kMaxTopk);
    if (to[i] >= 0 && to[i] <= limit) return true;
    fail(a.group.waits, FaultCode::kCount, Op::kNormalNotify, source, static_cast<uint64_t>(limit),
         static_cast<uint32_t>(word));
    return false;
}

// CTA 0, whole warps: every source's message to words [R][R + L]. False: gave up.
__device__ __forceinline__ bool pull_counts(const NotifyArgs& a, uint64_t epoch, int32_t* words) {
    const Group& group = a.group;
    const int vectors = notify_vectors(a), per_source = group.num_ranks() + a.local_experts;
    const int all = group.num_ranks() * vectors;
    Watch watch{group.waits, Op::kNormalNotify};
#pragma unroll 1
    for (int base = 32 * warp_of(); base < all; base += kCountThreads) {
        const int i = base + lane_of();  // lines are whole within a warp
        const int source = i / vectors, v = i - source * vectors;
        const uint8_t* const from[1] = {
            i < all ? group.notify_slot(group.rank(), epoch, source) + 16 * v : nullptr};
        const int peers[1] = {source};
        ptx::Vector got[1] = {};
        if (!await_vectors<1>(watch, from, peers, holds_tag(v), epoch, got)) return false;
        const int at = 2 * first_granule(v);
        int32_t* to = words + source * per_source;
        bool ok = true;
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            const uint64_t pair = h < 2 ? got[0].lo : got[0].hi;
            const bool is_word = from[0] != nullptr && (h < 2 || !holds_tag(v));
            if (is_word && at + h < per_source) {
                ok = take_count(a, source, at + h, pair >> (h % 2 * 32), to) && ok;
            }
        }
        if (__any_sync(kFullWarp, !ok)) return false;  // the warp waits for tags as one
    }
    return true;
}

// CTA 0: the tables that everybody's counts give, in memory of the caller, and what the host asks.
__device__ __forceinline__ void report_counts(const NotifyArgs& a, uint64_t epoch,
                                              const int32_t* words) {
    const int num_ranks = a.group.num_ranks(), per_source = num_ranks + a.local_experts;
    const HostCounts at{a.local_experts};
    const bool tell = a.host_counts != nullptr;
#pragma unroll 1
    for (int l = threadIdx.x; l < a.local_experts; l += kCountThreads) {
        int32_t rows = 0;
        for (int s = 0; s < num_ranks; ++s) rows += words[s * per_source + num_ranks + l];
        const auto padded = static_cast<int32_t>(round_up(rows, a.alignment));
        a.recv_counts[l] = padded;
        if (tell) a.host_counts[at.kExperts + l] = padded;
    }
    int32_t most_rows = 0, most_inbox = 0;
#pragma unroll 1
    for (int r = lane_of(); warp_of() == 0 && r < num_ranks; r += 32) {
        int32_t rows = 0, away = 0;
        for (int s = 0; s < num_ranks; ++s) {
            rows += words[s * per_source + r];
            a.tables.rank_prefix[s * num_ranks + r] = rows;
            away += s == r ? 0 : words[r * per_source + s];
        }
        if (tell && r == a.group.rank()) a.host_counts[at.kTotal] = rows;
        most_rows = max(most_rows, rows);
        most_inbox = max(most_inbox, away);
    }
    if (!tell) return;
    if (warp_of() == 0) {
        most_rows = __reduce_max_sync(kFullWarp, most_rows);
        most_inbox = __reduce_max_sync(kFullWarp, most_inbox);
        if (lane_of() == 0) {
            a.host_counts[at.most_rows()] = most_rows;
            a.host_counts[at.most_inbox()] = most_inbox;
        }
    }
    __syncthreads();
    // The host polls it; what the other threads wrote comes before, through the barrier.
    if (threadIdx.x == 0) {
        ptx::store_release_sys(&a.host_counts[at.ready()], static_cast<int32_t>(epoch));
    }
}

// The whole grid, at least one CTA; two where there are tokens.
__device__ __forceinline__ void notify(const NotifyArgs& a, uint8_t* smem) {
    ptx::await_previous_kernel();
    ptx::allow_next_kernel();
    auto* words = reinterpret_cast<int32_t*>(smem);
    if (blockIdx.x != 0) {
        if (may_run(a.group, Op::kNormalNotify)) place_tokens(a, words);
        return;
    }
    const uint64_t epoch = a.group.state->notified + 1;
    push_counts(a, epoch);
    if (a.num_tokens == 0) check_no_tokens(a);
    if (!may_run(a.group, Op::kNormalNotify)) return;
    const bool ok = pull_counts(a, epoch, words);
    if (__syncthreads_or(!ok) != 0) return;
    if (threadIdx.x == 0) a.group.state->notified = epoch;  // all have read it: the barrier
    report_counts(a, epoch, words);
}

}  // namespace ep::normal

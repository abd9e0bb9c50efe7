// Dispatch, first half: every token once to each rank that owns one of its experts.
//
// CTA 0 counts all tokens and announces the counts; the others quantise and push a stretch of
// tokens each. Sends never wait.
#pragma once

#include "cuda/destinations.cuh"
#include "cuda/lines.cuh"
#include "cuda/quantise.cuh"
#include "cuda/roles.cuh"
#include "cuda/routes.cuh"

namespace ep {

// Shared memory: message, to the end of its last line | counts[R][words] | destinations.
struct SendScratch {
    uint64_t* message;
    RouteCounts counts;
    Destinations* to;

    static EP_HD int bytes(const View& view) {
        const int words = RouteCounts::num_words(view);
        return static_cast<int>(
            round_up(view.message_room() + 4 * words + Destinations::bytes(view), 16));
    }
    static __device__ __forceinline__ SendScratch carve(uint8_t* smem, const View& view) {
        auto* words = reinterpret_cast<int32_t*>(smem + view.message_room());
        return {reinterpret_cast<uint64_t*>(smem),
                {words},
                reinterpret_cast<Destinations*>(words + RouteCounts::num_words(view))};
    }
};

// All threads, as are all preparations; the caller synchronises.
__device__ __forceinline__ void prepare_send(const View& view, SendScratch scratch) {
    clear_counts(view, scratch.counts);
}

__device__ __forceinline__ int valid_tokens(const View& view, const SendInput& in) {
    const int n = min(in.num_tokens, view.max_tokens);
    return in.num_valid == nullptr ? n : max(0, min(n, *in.num_valid));
}

// All threads but the clerk's. The terms' word is zero in shared memory: it goes in on the way.
__device__ __forceinline__ void push_counts(const View& view, RowTerms rows, const Turn& turn,
                                            RouteCounts counts) {
    static_assert(CountsLayout::kTerms == 1);
    const uint64_t terms = uint64_t{mix_terms(turn.absent.digest(view), rows)} << 32;
    const uint64_t epoch = turn.epoch;
    const int64_t slot = view.counts_out + (epoch & 1) * view.num_ranks * view.counts_stride;
    const int granules = view.counts_words / 2;
    const auto* words = reinterpret_cast<const uint64_t*>(counts.words);
    const int chunks = (view.counts_vectors + 31) / 32;
#pragma unroll 1
    for (int dst = 0, task = send_thread() / 32; task < view.num_ranks * chunks;
         task += kSendThreads / 32) {
        while (task >= (dst + 1) * chunks) ++dst;
        const int v = (task - dst * chunks) * 32 + static_cast<int>(threadIdx.x & 31);
        if (v >= view.counts_vectors || turn.absent.leaves_out(view, dst)) continue;
        const int g = first_granule(v);
        const uint64_t* from = words + dst * granules + g;
        const uint64_t lo = (g < granules ? from[0] : 0) | (g == 0 ? terms : 0);
        const uint64_t hi = holds_tag(v) ? epoch : (g + 1 < granules ? from[1] : 0);
        ptx::store_line_vector(view.peer[dst] + slot + 16 * v, {lo, hi});
    }
}

// CTA 0, all warps but the clerk, when all tokens are counted: to every rank, how many messages and
// how many rows per expert it will get.
__device__ __forceinline__ void announce_counts(const View& view, const SendInput& in,
                                                const Turn& turn, int num_tokens,
                                                SendScratch scratch) {
    push_counts(view, in.rows(), turn, scratch.counts);
    // Padding rows went nowhere: combine must not look for them.
    const int padded = min(in.num_tokens, view.max_tokens) * view.num_ranks;
#pragma unroll 1
    for (int i = num_tokens * view.num_ranks + send_thread(); i < padded; i += kSendThreads) {
        in.routing.sent[i] = -1;
    }
    if (threadIdx.x == kRouter * 32) {
        uint64_t messages = 0;
#pragma unroll 1
        for (int r = 0; r < view.num_ranks; ++r) messages += *scratch.counts.messages(view, r);
        add_statistic(view.stats->messages_sent, messages);
        add_statistic(view.stats->bytes_dispatched, messages * view.message_bytes);
    }
}

// One warp: entries that name no expert, or one twice.
__device__ __forceinline__ void report_dropped(const View& view, const Choice& c, int raw) {
    const unsigned dropped = __ballot_sync(kFullWarp, c.dropped);
    if (dropped == 0 || static_cast<int>(threadIdx.x & 31) != __ffs(dropped) - 1) return;
    record_routing(view, __popc(dropped), raw);
}

// The weight of an entry. Where weights come with the combine, which entry it is: combine finds
// them so.
__device__ __forceinline__ float entry_weight(const SendInput& in, int64_t entry) {
    return in.weights == nullptr ? bits_to_float(static_cast<uint32_t>(entry)) : in.weights[entry];
}

// One warp: what a token chose, entry k at lane k. (Few entries lie in the other lanes as well,
// until they are checked.)
struct Route {
    int raw;
    float weight;
    Choice choice;
    uint8_t* inbox;  // at the rank whose turn the lane is; it does not depend on the token

    __device__ __forceinline__ void load(const View& view, const SendInput& in, int token) {
        const int lane = threadIdx.x & 31;
        const int k = view.topk > kUsualTopk ? lane : lane & (kUsualTopk - 1);
        const int64_t entry = static_cast<int64_t>(token) * view.topk + k;
        raw = k < view.topk ? in.expert(entry) : -1;
        weight = k < view.topk ? entry_weight(in, entry) : 0.0f;
    }
    __device__ __forceinline__ void check(const View& view, Absent absent) {
        const int chosen = absent.reachable(view, raw);
        choice = view.topk > kUsualTopk ? check_many(view, chosen, 0) : check_few(view, chosen);
    }
};

// One warp: the token's header and entries, and its slot at every rank; then counts the token.
__device__ __forceinline__ void route_token(const View& view, const SendInput& in, int token,
                                            uint64_t epoch, const Route& route,
                                            SendScratch scratch) {
    const int lane = threadIdx.x & 31;
    const Choice& c = route.choice;
    auto* bytes = reinterpret_cast<uint8_t*>(scratch.message);
    if (lane < view.topk) {
        int32_t position = 0;
        if (c.expert >= 0) position = (*scratch.counts.rows(view, c.expert, c.rank))++;
        reinterpret_cast<Entry*>(bytes + view.entries_offset)[lane] = {c.expert, position,
                                                                       route.weight};
    }
    if (lane == 0) {
        *reinterpret_cast<MessageHeader*>(bytes + view.header_offset) = {token, view.topk};
    }
    const int turn = turn_of(view, c.rank);
    int known = 0;
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        const bool goes = goes_to(c, turn, base);
        const int rank = rank_at(view, min(base + lane, view.num_ranks - 1));
        int slot = -1;
        if (goes) slot = (*scratch.counts.messages(view, rank))++;
        if (base + lane < view.num_ranks) in.routing.sent[token * view.num_ranks + rank] = slot;
        uint8_t* const inbox = base == 0 ? route.inbox : inbox_at(view, base + lane, epoch);
        known = scratch.to->add(known, goes, inbox + slot * int64_t{view.message_stride});
    }
    if (lane == 0) scratch.to->count = known;
}

// One warp: the scales of an opaque row.
__device__ __forceinline__ void stage_scales(const View& view, const SendInput& in, int token,
                                             uint32_t* to) {
    const uint32_t* from = in.scales + token * in.scale_row_stride;
#pragma unroll 1
    for (int g = threadIdx.x & 31; g < view.num_scales; g += 32) {
        to[g] = from[g * in.scale_group_stride];
    }
}

// Stores vectors v, v + step, ... of the message in shared memory to its slot at every rank it goes
// to; the lanes of a warp store whole lines. Pairs with the receivers' polls of the tags.
template <int U>
__device__ __forceinline__ void push_vectors(const View& view, SendScratch scratch, int v, int step,
                                             uint64_t epoch) {
    ptx::Vector vector[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const int i = v + u * step;
        if (i >= view.message_vectors) continue;
        const int g = first_granule(i);
        vector[u] = {scratch.message[g], holds_tag(i) ? epoch : scratch.message[g + 1]};
    }
    const int count = static_cast<int>(scratch.to->count);
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
        uint8_t* const to = scratch.to->slots()[j] + 16 * v;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (v + u * step < view.message_vectors) {
                ptx::store_line_vector(to + 16 * u * step, vector[u]);
            }
        }
    }
}

// What a CTA holds of its next token: a warp its part of the row, or the router what it chose.
template <int kRowPairs>
struct NextToken {
    RowRegisters<kRowPairs> row;
    Route route{};

    __device__ __forceinline__ void load(const View& view, const SendInput& in, int token) {
        const int warp = this_warp();
        if (warp < kClerk) row.load(in.x + token * in.row_stride, view.input_vectors);
        if (warp == kRouter) route.load(view, in, token);
    }
    // Into the message in shared memory.
    template <bool kQuantise>
    __device__ __forceinline__ void stage(const View& view, const SendInput& in, int token,
                                          uint64_t epoch, SendScratch scratch) const {
        auto* bytes = reinterpret_cast<uint8_t*>(scratch.message);
        auto* scales = bytes + view.scales_offset;
        if (this_warp() == kRouter) {
            route_token(view, in, token, epoch, route, scratch);
            if (kQuantise || view.num_scales == 0) return;
            stage_scales(view, in, token, reinterpret_cast<uint32_t*>(scales));
        } else if constexpr (kQuantise) {
            row.stage_fp8(bytes + view.row_offset, reinterpret_cast<float*>(scales),
                          view.input_vectors, in.round_scale);
        } else {
            row.stage(bytes + view.row_offset, view.input_vectors);
        }
    }
};

// The other CTAs, all warps but the clerk: tokens [first, last), of which `next` holds the first;
// earlier ones are counted.
template <bool kQuantise, int kRowPairs>
__device__ __forceinline__ void push_tokens(const View& view, const SendInput& in, const Turn& turn,
                                            int first, int last, NextToken<kRowPairs>& next,
                                            SendScratch scratch) {
    constexpr int U = 2;
    const bool routes = this_warp() == kRouter;
#pragma unroll 1
    for (int t = first; t < last; ++t) {
        const bool more = t + 1 < last;
        if (t > first) __syncthreads();  // the message buffer is free again
        next.template stage<kQuantise>(view, in, t, turn.epoch, scratch);
        const Route done = next.route;
        if (more) next.load(view, in, t + 1);
        __syncthreads();
#pragma unroll 1
        for (int v = send_thread(); v < view.message_vectors; v += U * kSendThreads) {
            push_vectors<U>(view, scratch, v, kSendThreads, turn.epoch);
        }
        if (!routes) continue;
        report_dropped(view, done.choice, done.raw);
        if (more) next.route.check(view, turn.absent);
    }
}

// The clerk meanwhile. It only meets the others: counts are rarely here so soon, and racecheck
// loses count where some warps of a CTA meet without the rest (docs/benchmarks.md).
__device__ __forceinline__ void attend_pushes(int first, int last) {
#pragma unroll 1
    for (int t = first; t < last; ++t) {
        if (t > first) __syncthreads();
        __syncthreads();
    }
}

// Each CTA but the first has a stretch of consecutive tokens, so that what earlier ones chose is
// counted once. All warps count.
template <bool kQuantise, int kRowPairs>
__device__ __forceinline__ void dispatch_send(const View& view, const SendInput& in, int stretch,
                                              const Turn& turn, SendScratch scratch) {
    const int num_tokens = valid_tokens(view, in);
    const bool announces = blockIdx.x == 0;
    const int first = announces ? num_tokens : (static_cast<int>(blockIdx.x) - 1) * stretch;
    const int last = min(num_tokens, first + stretch);
    if (!announces && first >= last) return;
    NextToken<kRowPairs> next;
    if (!announces) next.load(view, in, first);  // in flight while earlier tokens are counted
    if (this_warp() == kRouter) {
        next.route.inbox = inbox_at(view, static_cast<int>(threadIdx.x & 31), turn.epoch);
    }
    if (first > 0) count_tokens(view, in, turn.absent, first, scratch.counts);
    if (!announces && this_warp() == kRouter) next.route.check(view, turn.absent);
    if (first > 0 || announces) __syncthreads();
    const bool clerk = this_warp() == kClerk;
    if (announces) {
        if (!clerk) announce_counts(view, in, turn, num_tokens, scratch);
    } else if (clerk) {
        attend_pushes(first, last);
    } else {
        push_tokens<kQuantise, kRowPairs>(view, in, turn, first, last, next, scratch);
    }
}

}  // namespace ep

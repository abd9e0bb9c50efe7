// Dispatch, first half: every token once to each rank that owns one of its experts.
//
// CTA 0 counts all tokens and announces the counts; the others quantise and push a stretch of
// tokens each. Sends never wait.
#pragma once

#include "cuda/lines.cuh"
#include "cuda/quantise.cuh"
#include "cuda/routes.cuh"

namespace ep {

// Shared memory: message, to the end of its last line | rows[E] | messages[R] | slots[R].
struct SendScratch {
    uint64_t* message;
    RouteCounts counts;
    int32_t* slots;  // [R] where the current token goes; -1: not to this rank

    static EP_HD int bytes(const View& view) {
        const int used = view.message_room() + 4 * (view.num_experts + 2 * view.num_ranks);
        return static_cast<int>(round_up(used, 16));
    }
    static __device__ __forceinline__ SendScratch carve(uint8_t* smem, const View& view) {
        auto* words = reinterpret_cast<int32_t*>(smem + view.message_room());
        return {reinterpret_cast<uint64_t*>(smem),
                {words, words + view.num_experts},
                words + view.num_experts + view.num_ranks};
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

// A pair of words of the counts message for one rank (csrc/ep/layout.h).
__device__ __forceinline__ uint64_t counts_granule(const View& view, RouteCounts counts,
                                                   uint32_t mask, int dst, int g) {
    static_assert(CountsLayout::kMessages == 0 && CountsLayout::kMask == 1);
    if (g == 0)
        return (static_cast<uint64_t>(mask) << 32) | static_cast<uint32_t>(counts.messages[dst]);
    const int x = 2 * g - 2;
    const int32_t* rows = counts.rows + dst * view.local_experts;
    const uint64_t lo = x < view.local_experts ? static_cast<uint32_t>(rows[x]) : 0;
    const uint64_t hi = x + 1 < view.local_experts ? static_cast<uint32_t>(rows[x + 1]) : 0;
    return lo | (hi << 32);
}

// CTA 0: to every rank, how many messages and how many rows per expert it will get.
__device__ __forceinline__ void announce_counts(const View& view, const SendInput& in,
                                                const Turn& turn, int num_tokens,
                                                SendScratch scratch) {
    const uint64_t epoch = turn.epoch;
    const uint32_t mask = turn.absent.digest(view);
    count_tokens(view, in, turn.absent, num_tokens, scratch.counts);
    __syncthreads();

    const int64_t slot = view.counts_out + (epoch & 1) * view.num_ranks * view.counts_stride;
#pragma unroll 1
    for (int dst = 0, i = threadIdx.x; i < view.num_ranks * view.counts_vectors; i += kThreads) {
        while (i >= (dst + 1) * view.counts_vectors) ++dst;
        if (turn.absent.has(view, dst)) continue;
        const int v = i - dst * view.counts_vectors;
        const int g = first_granule(v);
        const uint64_t lo = counts_granule(view, scratch.counts, mask, dst, g);
        const uint64_t hi =
            holds_tag(v) ? epoch : counts_granule(view, scratch.counts, mask, dst, g + 1);
        ptx::store_line_vector(view.peer[dst] + slot + 16 * v, {lo, hi});
    }
    // Padding rows went nowhere: combine must not look for them.
    const int padded = min(in.num_tokens, view.max_tokens) * view.num_ranks;
#pragma unroll 1
    for (int i = num_tokens * view.num_ranks + threadIdx.x; i < padded; i += kThreads) {
        in.routing.sent[i] = -1;
    }
    if (threadIdx.x == kThreads - 32) {  // the first warps have counts to pull next
        uint64_t messages = 0;
#pragma unroll 1
        for (int r = 0; r < view.num_ranks; ++r) messages += scratch.counts.messages[r];
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

// One warp, entry k at lane k: the header, and the token's slot at every rank; then counts the
// token.
__device__ __forceinline__ void route_token(const View& view, const SendInput& in, Absent absent,
                                            int token, int raw, float weight, SendScratch scratch) {
    const int lane = threadIdx.x & 31;
    const Choice c = check_choice(view, absent.reachable(view, raw), 0);
    auto* bytes = reinterpret_cast<uint8_t*>(scratch.message);
#pragma unroll 1
    for (int r = lane; r < view.num_ranks; r += 32) scratch.slots[r] = -1;
    if (lane < view.topk) {
        int32_t position = 0;
        if (c.expert >= 0) position = scratch.counts.rows[c.expert]++;
        reinterpret_cast<Entry*>(bytes + view.entries_offset)[lane] = {c.expert, position, weight};
    }
    if (lane == 0) {
        *reinterpret_cast<MessageHeader*>(bytes + view.header_offset) = {token, view.topk};
    }
    __syncwarp();
    if (c.leads_message) scratch.slots[c.rank] = scratch.counts.messages[c.rank]++;
    __syncwarp();
    int32_t* sent = in.routing.sent + token * view.num_ranks;
#pragma unroll 1
    for (int r = lane; r < view.num_ranks; r += 32) sent[r] = scratch.slots[r];

    report_dropped(view, c, raw);
}

// The weight of lane k's entry. Where weights come with the combine, k itself: combine finds them
// so.
__device__ __forceinline__ float entry_weight(const SendInput& in, int64_t entry) {
    const uint32_t k = threadIdx.x & 31;
    return in.weights == nullptr ? bits_to_float(k) : in.weights[entry];
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

// Stores vector v of the message in shared memory to its slot at every rank it goes to; the lanes
// of a warp store whole lines. Pairs with the receivers' polls of the tags. Starts with the next
// rank, so that ranks do not all write to the same one at once.
__device__ __forceinline__ void push_vector(const View& view, SendScratch scratch, int v,
                                            int64_t out, uint64_t epoch) {
    const int g = first_granule(v);
    const ptx::Vector vector{scratch.message[g], holds_tag(v) ? epoch : scratch.message[g + 1]};
    int dst = view.rank;
#pragma unroll 1
    for (int j = 0; j < view.num_ranks; ++j) {
        dst = dst + 1 < view.num_ranks ? dst + 1 : 0;
        const int slot = scratch.slots[dst];
        if (slot < 0) continue;
        uint8_t* to = view.peer[dst] + out + static_cast<int64_t>(slot) * view.message_stride;
        ptx::store_line_vector(to + 16 * v, vector);
    }
}

// The other CTAs: a stretch of consecutive tokens each, so that what earlier tokens chose is
// counted once. The last warp routes: with most hidden sizes it has the least of the row.
template <bool kQuantise, int kRowPairs>
__device__ __forceinline__ void push_tokens(const View& view, const SendInput& in, const Turn& turn,
                                            int num_tokens, int stretch, SendScratch scratch) {
    const int first = (static_cast<int>(blockIdx.x) - 1) * stretch;
    const int last = min(num_tokens, first + stretch);
    if (first >= last) return;
    const uint64_t epoch = turn.epoch;

    const int lane = threadIdx.x & 31;
    const bool routes = threadIdx.x >= kStagingThreads;
    const bool has_entry = routes && lane < view.topk;
    RowRegisters<kRowPairs> row;
    row.load(in.x + first * in.row_stride,
             view.input_vectors);  // in flight while earlier tokens are counted
    int64_t entry = static_cast<int64_t>(first) * view.topk + lane;
    int raw = has_entry ? in.expert(entry) : -1;
    float weight = has_entry ? entry_weight(in, entry) : 0.0f;

    const int64_t out = view.dispatch_out + view.dispatch_at(epoch);

    if (first > 0) {
        count_tokens(view, in, turn.absent, first, scratch.counts);
        __syncthreads();
    }
#pragma unroll 1
    for (int t = first; t < last; ++t) {
        const bool more = t + 1 < last;
        auto* bytes = reinterpret_cast<uint8_t*>(scratch.message);
        if (routes) {
            route_token(view, in, turn.absent, t, raw, weight, scratch);
            entry += view.topk;
            if (more && has_entry) {
                raw = in.expert(entry);
                weight = entry_weight(in, entry);
            }
            if (!kQuantise && view.num_scales > 0) {
                stage_scales(view, in, t, reinterpret_cast<uint32_t*>(bytes + view.scales_offset));
            }
        } else {
            if (kQuantise) {
                row.stage_fp8(bytes + view.row_offset,
                              reinterpret_cast<float*>(bytes + view.scales_offset),
                              view.input_vectors, in.round_scale);
            } else {
                row.stage(bytes + view.row_offset, view.input_vectors);
            }
            if (more) row.load(in.x + (t + 1) * in.row_stride, view.input_vectors);
        }
        __syncthreads();
#pragma unroll 1
        for (int v = threadIdx.x; v < view.message_vectors; v += kThreads) {
            push_vector(view, scratch, v, out, epoch);
        }
        if (more) __syncthreads();  // the message buffer is free again
    }
}

template <bool kQuantise, int kRowPairs>
__device__ __forceinline__ void dispatch_send(const View& view, const SendInput& in, int stretch,
                                              const Turn& turn, SendScratch scratch) {
    const int num_tokens = valid_tokens(view, in);
    if (blockIdx.x == 0) {
        announce_counts(view, in, turn, num_tokens, scratch);
    } else {
        push_tokens<kQuantise, kRowPairs>(view, in, turn, num_tokens, stretch, scratch);
    }
}

}  // namespace ep

// Dispatch, first half, where a CTA has several tokens: it takes a round of them at a time.
//
// Token by token (dispatch_send.cuh) one warp routes, and the CTA meets twice for every message.
// Here a warp routes each of a round's tokens, all stage strips of its rows, and all push: they
// meet four times a round. CTA 0 counts and announces as ever.
#pragma once

#include "cuda/dispatch_send.cuh"

namespace ep {

// Shared memory: messages[n] | rows[E] | messages[R] | slots[n][R] | chosen[E] | going[R], for
// rounds of n tokens.
struct RoundScratch {
    SendScratch first;  // of the round's first message
    uint32_t* chosen;  // bit i: token i of the round chose the expert
    uint32_t* going;  // bit i: it goes to the rank
    int message_granules;
    int num_ranks;

    static constexpr int kMostTokens = 4;
    static constexpr int kMostBytes = 144 << 10;  // of messages; a single one is never larger

    static EP_HD int room(const View& view) {
        return static_cast<int>(round_up(view.message_room(), 16));
    }
    static EP_HD int tokens(const View& view) {
        const int fit = kMostBytes / room(view);
        return fit < kMostTokens ? fit : kMostTokens;
    }
    static EP_HD int bytes(const View& view) {
        const int n = tokens(view);
        const int words = 2 * view.num_experts + (2 + n) * view.num_ranks;
        return static_cast<int>(round_up(n * room(view) + 4 * words, 16));
    }
    static __device__ __forceinline__ RoundScratch carve(uint8_t* smem, const View& view) {
        const int n = tokens(view);
        auto* rows = reinterpret_cast<int32_t*>(smem + n * room(view));
        int32_t* messages = rows + view.num_experts;
        int32_t* slots = messages + view.num_ranks;
        auto* chosen = reinterpret_cast<uint32_t*>(slots + n * view.num_ranks);
        return {{reinterpret_cast<uint64_t*>(smem), {rows, messages}, slots},
                chosen,
                chosen + view.num_experts,
                room(view) / 8,
                view.num_ranks};
    }
    __device__ __forceinline__ SendScratch message(int i) const {
        return {first.message + i * message_granules, first.counts, first.slots + i * num_ranks};
    }
    // What earlier tokens of the round add to a count.
    static __device__ __forceinline__ int before(uint32_t bits, int i) {
        return __popc(bits & ((1u << i) - 1));
    }
};

// All threads; the caller synchronises.
__device__ __forceinline__ void prepare_rounds(const View& view, const RoundScratch& scratch) {
    clear_counts(view, scratch.first.counts);
#pragma unroll 1
    for (int e = threadIdx.x; e < view.num_experts + view.num_ranks; e += kThreads) {
        scratch.chosen[e] = 0;
    }
}

// Between rounds: the round's tokens are earlier ones now. All threads.
__device__ __forceinline__ void count_round(const View& view, const RoundScratch& scratch) {
#pragma unroll 1
    for (int e = threadIdx.x; e < view.num_experts + view.num_ranks; e += kThreads) {
        scratch.first.counts.rows[e] += __popc(scratch.chosen[e]);
        scratch.chosen[e] = 0;
    }
}

// Work on equal rows, cut into strips of `width` vectors: a warp's strips, one by one.
struct Strips {
    int strip;
    int row;
    int per_row;
    int width;

    __device__ __forceinline__ Strips(int warp, int vectors_per_row, int strip_width)
        : strip(warp),
          row(0),
          per_row((vectors_per_row + strip_width - 1) / strip_width),
          width(strip_width) {}
    __device__ __forceinline__ bool within(int rows) {
        while (strip >= per_row) {
            strip -= per_row;
            ++row;
        }
        return row < rows;
    }
    __device__ __forceinline__ int first_vector() const { return width * strip; }
};

// One warp: what token i of the round chose, entry k at lane k.
struct Route {
    Choice choice;
    float weight;
};
__device__ __forceinline__ Route pick_route(const View& view, const SendInput& in, Absent absent,
                                            int token, int i, const RoundScratch& scratch) {
    const int lane = threadIdx.x & 31;
    const bool has_entry = lane < view.topk;
    const int64_t entry = static_cast<int64_t>(token) * view.topk + lane;
    const int raw = has_entry ? in.expert(entry) : -1;
    const float weight = has_entry ? entry_weight(in, entry) : 0.0f;
    const Choice c = check_choice(view, absent.reachable(view, raw), 0);
    if (c.expert >= 0) atomicOr(&scratch.chosen[c.expert], 1u << i);
    if (c.leads_message) atomicOr(&scratch.going[c.rank], 1u << i);
    report_dropped(view, c, raw);
    return {c, weight};
}

// The same warp, once all tokens of the round have picked and all earlier ones are counted: the
// header, the entries and the slots.
__device__ __forceinline__ void settle_route(const View& view, const SendInput& in, int token,
                                             int i, const Route& route,
                                             const RoundScratch& scratch) {
    const int lane = threadIdx.x & 31;
    const SendScratch own = scratch.message(i);
    const RouteCounts& counts = own.counts;
    const int expert = route.choice.expert;
    auto* bytes = reinterpret_cast<uint8_t*>(own.message);
    if (lane < view.topk) {
        const int32_t position =
            expert < 0 ? 0 : counts.rows[expert] + RoundScratch::before(scratch.chosen[expert], i);
        reinterpret_cast<Entry*>(bytes + view.entries_offset)[lane] = {expert, position,
                                                                       route.weight};
    }
    if (lane == 0) {
        *reinterpret_cast<MessageHeader*>(bytes + view.header_offset) = {token, view.topk};
    }
    int32_t* sent = in.routing.sent + token * view.num_ranks;
#pragma unroll 1
    for (int r = lane; r < view.num_ranks; r += 32) {
        const uint32_t going = scratch.going[r];
        const bool goes = (going >> i & 1) != 0;
        own.slots[r] = sent[r] = goes ? counts.messages[r] + RoundScratch::before(going, i) : -1;
    }
}

// All warps: rows, and the scales that the caller gives, into their messages.
template <bool kQuantise>
__device__ __forceinline__ void stage_round(const View& view, const SendInput& in, int first, int n,
                                            const RoundScratch& scratch) {
    constexpr int kWarps = kThreads / 32;
    constexpr int kInFlight = 4;
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int lane = threadIdx.x & 31;
    const int num_vectors = view.input_vectors;
    Strips strips(warp, num_vectors, 64);
#pragma unroll 1
    while (strips.within(n)) {
        Pair pair[kInFlight];
        int row[kInFlight];
        int at[kInFlight];  // vector of the row; num_vectors: nothing
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const bool some = strips.within(n);
            row[u] = strips.row;
            at[u] = some ? strips.first_vector() + 2 * lane : num_vectors;
            pair[u].load(in.x + (first + row[u]) * in.row_stride, at[u], num_vectors);
            strips.strip += kWarps;
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const float amax = kQuantise ? group_amax(pair[u]) : 0.0f;
            if (at[u] >= num_vectors) continue;
            auto* bytes = reinterpret_cast<uint8_t*>(scratch.message(row[u]).message);
            if constexpr (kQuantise) {
                stage_fp8(bytes + view.row_offset,
                          reinterpret_cast<float*>(bytes + view.scales_offset), at[u], pair[u],
                          amax, in.round_scale);
            } else {
                pair[u].store(bytes + view.row_offset, at[u], num_vectors);
            }
        }
    }
    if constexpr (!kQuantise) {
        if (view.num_scales == 0) return;
#pragma unroll 1
        for (int i = warp; i < n; i += kWarps) {
            auto* bytes = reinterpret_cast<uint8_t*>(scratch.message(i).message);
            stage_scales(view, in, first + i,
                         reinterpret_cast<uint32_t*>(bytes + view.scales_offset));
        }
    }
}

// All warps: the messages to wherever they go.
__device__ __forceinline__ void push_round(const View& view, int n, int64_t out, uint64_t epoch,
                                           const RoundScratch& scratch) {
    Strips strips(static_cast<int>(threadIdx.x / 32), view.message_vectors, 32);
#pragma unroll 1
    for (; strips.within(n); strips.strip += kThreads / 32) {
        const int v = strips.first_vector() + static_cast<int>(threadIdx.x & 31);
        if (v >= view.message_vectors) continue;
        push_vector(view, scratch.message(strips.row), v, out, epoch);
    }
}

// All CTAs but the first: a stretch of consecutive tokens each, in rounds.
template <bool kQuantise>
__device__ __forceinline__ void push_rounds(const View& view, const SendInput& in, const Turn& turn,
                                            int num_tokens, int stretch,
                                            const RoundScratch& scratch) {
    static_assert(RoundScratch::kMostTokens <= kThreads / 32);
    const int begin = (static_cast<int>(blockIdx.x) - 1) * stretch;
    const int end = min(num_tokens, begin + stretch);
    if (begin >= end) return;
    const int64_t out = view.dispatch_out + view.dispatch_at(turn.epoch);
    const int most = RoundScratch::tokens(view);
    // The token of the round that a warp routes.
    const int own = static_cast<int>(threadIdx.x / 32);
    if (begin > 0) count_tokens(view, in, turn.absent, begin, scratch.first.counts);
    // Of several rounds the first has another length in every CTA, so that some push while others
    // stage: together they would leave the link idle, then fill it.
    int n = end - begin <= most ? end - begin : 1 + static_cast<int>(blockIdx.x) % most;
#pragma unroll 1
    for (int t = begin; t < end; t += n, n = min(most, end - t)) {
        Route route{};
        if (own < n) route = pick_route(view, in, turn.absent, t + own, own, scratch);
        stage_round<kQuantise>(view, in, t, n, scratch);
        __syncthreads();
        if (own < n) settle_route(view, in, t + own, own, route, scratch);
        __syncthreads();
        push_round(view, n, out, turn.epoch, scratch);
        if (t + n == end) break;
        count_round(view, scratch);
        __syncthreads();  // and the messages' places are free again
    }
}

template <bool kQuantise>
__device__ __forceinline__ void dispatch_send_rounds(const View& view, const SendInput& in,
                                                     int stretch, const Turn& turn,
                                                     const RoundScratch& scratch) {
    const int num_tokens = valid_tokens(view, in);
    if (blockIdx.x == 0) {
        announce_counts(view, in, turn, num_tokens, scratch.first);
    } else {
        push_rounds<kQuantise>(view, in, turn, num_tokens, stretch, scratch);
    }
}

}  // namespace ep

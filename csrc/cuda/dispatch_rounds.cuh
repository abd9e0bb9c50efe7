// Dispatch, first half, where a CTA has several tokens: it takes a round of them at a time.
//
// Token by token (dispatch_send.cuh) one warp routes, and the CTA meets twice for every message.
// Here a warp routes each of a round's tokens, all stage strips of its rows, and all push: they
// meet four times a round. CTA 0 counts and announces as ever.
#pragma once

#include "cuda/dispatch_send.cuh"

namespace ep {

// Shared memory: messages[n] | destinations[n] | counts[R][words] | picks[R][words], for rounds of
// n tokens.
struct RoundScratch {
    SendScratch first;  // of the round's first message
    RouteCounts picks;  // bit i of a word: token i of the round would be counted there
    int message_granules;
    int destinations_bytes;

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
        const int words = 2 * RouteCounts::num_words(view);
        const int each = room(view) + Destinations::bytes(view);
        return static_cast<int>(round_up(n * each + 4 * words, 16));
    }
    static __device__ __forceinline__ RoundScratch carve(uint8_t* smem, const View& view) {
        const int n = tokens(view);
        uint8_t* const to = smem + n * room(view);
        auto* words = reinterpret_cast<int32_t*>(to + n * Destinations::bytes(view));
        return {{reinterpret_cast<uint64_t*>(smem), {words}, reinterpret_cast<Destinations*>(to)},
                {words + RouteCounts::num_words(view)},
                room(view) / 8,
                Destinations::bytes(view)};
    }
    __device__ __forceinline__ SendScratch message(int i) const {
        auto* to = reinterpret_cast<uint8_t*>(first.to) + i * destinations_bytes;
        return {first.message + i * message_granules, first.counts,
                reinterpret_cast<Destinations*>(to)};
    }
    // What earlier tokens of the round add to a count.
    static __device__ __forceinline__ int before(int32_t bits, int i) {
        return __popc(static_cast<unsigned>(bits) & ((1u << i) - 1));
    }
};

// All threads; the caller synchronises.
__device__ __forceinline__ void prepare_rounds(const View& view, const RoundScratch& scratch) {
    clear_counts(view, scratch.first.counts);
    clear_counts(view, scratch.picks);
}

// Between rounds: the round's tokens are earlier ones now. All threads.
__device__ __forceinline__ void count_round(const View& view, const RoundScratch& scratch) {
#pragma unroll 1
    for (int i = threadIdx.x; i < RouteCounts::num_words(view); i += kThreads) {
        scratch.first.counts.words[i] += __popc(static_cast<unsigned>(scratch.picks.words[i]));
        scratch.picks.words[i] = 0;
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

// One warp: notes what token i of the round chose.
__device__ __forceinline__ void pick_route(const View& view, const Route& route, int i,
                                           const RoundScratch& scratch) {
    const Choice& c = route.choice;
    if (c.expert >= 0) atomicOr(scratch.picks.rows(view, c.expert, c.rank), 1 << i);
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        const int rank = base + static_cast<int>(threadIdx.x & 31);
        if (goes_to(c, c.rank, base)) atomicOr(scratch.picks.messages(view, rank), 1 << i);
    }
    report_dropped(view, c, route.raw);
}

// The same warp, once all tokens of the round have picked and all earlier ones are counted: the
// header, the entries and the slots.
__device__ __forceinline__ void settle_route(const View& view, const SendInput& in, int token,
                                             uint64_t epoch, int i, const Route& route,
                                             const RoundScratch& scratch) {
    const int lane = threadIdx.x & 31;
    const SendScratch own = scratch.message(i);
    const Choice& c = route.choice;
    auto* bytes = reinterpret_cast<uint8_t*>(own.message);
    if (lane < view.topk) {
        int32_t position = 0;
        if (c.expert >= 0) {
            position = *own.counts.rows(view, c.expert, c.rank) +
                       RoundScratch::before(*scratch.picks.rows(view, c.expert, c.rank), i);
        }
        reinterpret_cast<Entry*>(bytes + view.entries_offset)[lane] = {c.expert, position,
                                                                       route.weight};
    }
    if (lane == 0) {
        *reinterpret_cast<MessageHeader*>(bytes + view.header_offset) = {token, view.topk};
    }
    int known = 0;
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        const bool exists = base + lane < view.num_ranks;
        const int rank = rank_at(view, min(base + lane, view.num_ranks - 1));
        const int32_t going = *scratch.picks.messages(view, rank);
        const bool goes = exists && (going >> i & 1) != 0;
        const int slot = *own.counts.messages(view, rank) + RoundScratch::before(going, i);
        if (exists) in.routing.sent[token * view.num_ranks + rank] = goes ? slot : -1;
        known = own.to->add(
            known, goes, inbox_at(view, base + lane, epoch) + slot * int64_t{view.message_stride});
    }
    if (lane == 0) own.to->count = known;
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
__device__ __forceinline__ void push_round(const View& view, int n, uint64_t epoch,
                                           const RoundScratch& scratch) {
    Strips strips(static_cast<int>(threadIdx.x / 32), view.message_vectors, 32);
#pragma unroll 1
    for (; strips.within(n); strips.strip += kThreads / 32) {
        const int v = strips.first_vector() + static_cast<int>(threadIdx.x & 31);
        if (v >= view.message_vectors) continue;
        push_vectors<1>(view, scratch.message(strips.row), v, 0, epoch);
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
        if (own < n) {
            route.load(view, in, t + own);
            route.check(view, turn.absent);
            pick_route(view, route, own, scratch);
        }
        stage_round<kQuantise>(view, in, t, n, scratch);
        __syncthreads();
        if (own < n) settle_route(view, in, t + own, turn.epoch, own, route, scratch);
        __syncthreads();
        push_round(view, n, turn.epoch, scratch);
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
    if (blockIdx.x != 0) {
        return push_rounds<kQuantise>(view, in, turn, num_tokens, stretch, scratch);
    }
    const RouteCounts& counts = scratch.first.counts;
    count_tokens(view, in, turn.absent, num_tokens, counts);
    __syncthreads();
    if (this_warp() != kClerk) announce_counts(view, in, turn, num_tokens, scratch.first);
}

}  // namespace ep

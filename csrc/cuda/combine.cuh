// Combine: the expert's rank adds up its rows of each message and sends the sum home; the source
// adds what its ranks sent.
//
// Both sides work on units of a row, one warp each. Sums are FP32 in a fixed order (k, then rank),
// rounded to BF16 once at the sender and once at home. (Sums that travel as FP8: combine_fp8.cuh.)
#pragma once

#include "cuda/kernels.h"
#include "cuda/late_weights.cuh"
#include "cuda/sums.cuh"
#include "cuda/units.cuh"

namespace ep {

// Whether a rank's sum for its own tokens goes through its inbox, as those for others do, or is
// worked out by the receive. The inbox lets the caller reuse y between the send and the receive;
// without it there is less to move.
enum class OwnRows { kThroughInbox, kDirect };
// When weights came: with the dispatch, or with this combine (late_weights.cuh).
enum class Weights { kKnown, kLate };

// A lane's vectors of a unit, as sums.
struct Sum {
    Sum8 of[SumUnit::kVectors];

    __device__ __forceinline__ void add(const SumUnit& unit) {
#pragma unroll
        for (int j = 0; j < SumUnit::kVectors; ++j) of[j].add(1.0f, unit.v[j]);
    }
    __device__ __forceinline__ SumUnit rounded() const {
        SumUnit out;
#pragma unroll
        for (int j = 0; j < SumUnit::kVectors; ++j) out.v[j] = of[j].vector();
        return out;
    }
};

__device__ __forceinline__ int sum_lines(const View& view, int unit) {
    return min(kSumDataLines, view.sum_lines - unit * kSumDataLines);
}

// Lane k: entry k of a message's list of rows.
__device__ __forceinline__ RowRef load_ref(const View& view, const Routing& routing, int source,
                                           int slot) {
    const int64_t message = source * view.max_tokens + slot;
    return lane_id() < view.topk ? routing.refs[message * view.topk + lane_id()] : RowRef{-1, 0.0f};
}

// Adds entries [first, first + kRows) of a message's list. All loads come before the first sum, and
// no branch parts them: behind one, what was loaded first would wait in memory
// (docs/performance.md).
template <int kRows, int kVectors>
__device__ __forceinline__ void add_some(const CombineInput& in, RowRef ref, float weight,
                                         int first, const int (&byte)[kVectors],
                                         Sum8 (&sum)[kVectors]) {
    const auto* y = reinterpret_cast<const uint8_t*>(in.y);
    ptx::Vector x[kRows][kVectors];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int64_t row = __shfl_sync(kFullWarp, ref.row, first + i);
        const uint8_t* from = y + 2 * row * in.row_stride;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            x[i][j] = *reinterpret_cast<const ptx::Vector*>(from + byte[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const float w = __shfl_sync(kFullWarp, weight, first + i);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sum[j].add(w, x[i][j]);
    }
}

// Adds the rows of a message's list, two at a time. Lane k holds the weight of entry k. `byte`:
// where each of the lane's vectors lies in a row; lanes that have no data there give any place in
// it, and nobody uses their sums. Whole warps.
template <int kVectors>
__device__ __forceinline__ void add_rows(const CombineInput& in, RowRef ref, float weight,
                                         const int (&byte)[kVectors], Sum8 (&sum)[kVectors]) {
    const int listed = __ffs(__ballot_sync(kFullWarp, ref.row < 0)) - 1;
    const int end = listed < 0 ? 32 : listed;
    int k = 0;
#pragma unroll 1
    for (; k + 2 <= end; k += 2) add_some<2>(in, ref, weight, k, byte, sum);
    if (k < end) add_some<1>(in, ref, weight, k, byte, sum);
}

// A unit of a message's weighted sum, rounded. `ref`: load_ref of the message. Whole warps; false:
// gave up.
template <Weights kWeights>
__device__ __forceinline__ bool sum_message(const View& view, const CombineInput& in, Watch& watch,
                                            int source, int slot, RowRef ref, int unit, int lines,
                                            uint64_t epoch, SumUnit& out) {
    float weight = ref.weight;
    if constexpr (kWeights == Weights::kLate) {
        LateWeights late{};
        if (!late.load(view, in, watch, source, slot, epoch)) return false;
        weight = late.of(ref);
    }
    int byte[SumUnit::kVectors];
#pragma unroll
    for (int j = 0; j < SumUnit::kVectors; ++j) {
        byte[j] = SumUnit::has_data(j, lines) ? unit * kSumBytes + unit_byte(j) : 0;
    }
    Sum sum;
    add_rows(in, ref, weight, byte, sum.of);
    out = sum.rounded();
    return true;
}

// Most messages of one source in the handle's dispatch. Whole warps.
__device__ __forceinline__ int most_received(const View& view, const Routing& routing) {
    int most = 0;
#pragma unroll 1
    for (int s = lane_id(); s < view.num_ranks; s += 32) most = max(most, routing.received[s]);
    return __reduce_max_sync(kFullWarp, most);
}

// The units of all messages, slot by slot; within a slot, the sources in turn.
struct SendItem {
    int slot;
    int source;
    int unit;

    template <OwnRows kOwn>
    static __device__ __forceinline__ SendItem of(const View& view, int item) {
        constexpr bool kDirect = kOwn == OwnRows::kDirect;
        const int message = view.by_sums(item);
        const int slot = kDirect ? view.by_others(message) : view.by_ranks(message);
        const int source = message - slot * (kDirect ? view.num_ranks - 1 : view.num_ranks);
        const bool past_us = kDirect && source >= view.rank;
        return {slot, past_us ? source + 1 : source, item - message * view.sums};
    }
};

// The CTAs that send. Pairs with await_unit at each message's source. Warps that gave up leave one
// by one: no barrier follows, and the abort word stops whatever comes next.
template <OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ void send_sums(const View& view, const CombineInput& in,
                                          const Turn& turn, Share share) {
    if (kOwn == OwnRows::kDirect && view.num_ranks == 1) return;
    SendItem item = SendItem::of<kOwn>(view, share.first);
    const auto load = [&] {
        return item.slot < view.max_tokens ? load_ref(view, in.routing, item.source, item.slot)
                                           : RowRef{-1, 0.0f};
    };
    RowRef ref = load();  // asked for together with the counts
    const int most = most_received(view, in.routing);
    Watch watch{view, Op::kCombine};
#pragma unroll 1
    for (int i = share.first; item.slot < most;) {
        const SendItem now = item;
        const RowRef mine = ref;
        item = SendItem::of<kOwn>(view, i += share.step);
        ref = load();
        if (now.slot >= in.routing.received[now.source]) continue;
        if (turn.absent.has(view, now.source)) continue;
        const int lines = sum_lines(view, now.unit);
        SumUnit out;
        if (!sum_message<kWeights>(view, in, watch, now.source, now.slot, mine, now.unit, lines,
                                   turn.epoch, out)) {
            return;
        }
        out.pack(turn.epoch);
        out.store(view.peer[now.source] + view.combine_out + view.combine_at(turn.epoch) +
                      static_cast<int64_t>(now.slot) * view.combine_stride +
                      now.unit * kSumLines * kLineBytes,
                  lines);
    }
}

// Adds what the ranks sent for one unit of a token, in rank order. `sent` [R]: the token's slots.
// Whole warps; false: gave up.
template <OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ bool gather_sums(const View& view, const CombineInput& in, Watch& watch,
                                            const int32_t* sent, int unit, int lines,
                                            const Turn& turn, SumUnit& out) {
    const uint64_t epoch = turn.epoch;
    const uint8_t* inbox = view.combine_in + view.combine_at(epoch) + unit * kSumLines * kLineBytes;
    SumUnit own;
    if (kOwn == OwnRows::kDirect) {
        const int slot = turn.absent.has(view, view.rank) ? -1 : sent[view.rank];
        if (slot >= 0) {
            const RowRef ref = load_ref(view, in.routing, view.rank, slot);
            // Rounded as if it had travelled.
            if (!sum_message<kWeights>(view, in, watch, view.rank, slot, ref, unit, lines, epoch,
                                       own)) {
                return false;
            }
        }
    }
    Sum sum;  // not before: registers would not do
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        const int r = base + lane_id();
        const int slot = r < view.num_ranks && !turn.absent.has(view, r) ? sent[r] : -1;
#pragma unroll 1
        for (unsigned left = __ballot_sync(kFullWarp, slot >= 0); left != 0; left &= left - 1) {
            const int lane = __ffs(left) - 1;
            const int peer = base + lane;
            if (kOwn == OwnRows::kDirect && peer == view.rank) {
                sum.add(own);
                continue;
            }
            const int there = peer * view.max_tokens + __shfl_sync(kFullWarp, slot, lane);
            const uint8_t* from = inbox + static_cast<int64_t>(there) * view.combine_stride;
            SumUnit row;  // one at a time: two would cost registers, and were slower
            if (!await_unit(watch, from, peer, lines, epoch, row)) return false;
            row.unpack();
            sum.add(row);
        }
    }
    out = sum.rounded();
    return true;
}

struct CombineTokens {
    int rows;  // of the output
    int valid;  // that were dispatched
};

__device__ __forceinline__ CombineTokens combine_tokens(const View& view,
                                                        const CombineOutput& out) {
    const int rows = min(out.num_tokens, view.max_tokens);
    return {rows, out.num_valid == nullptr ? rows : min(rows, *out.num_valid)};
}

// The CTAs that receive. Padding rows and tokens without experts become zeros.
template <OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ void receive_sums(const View& view, const CombineInput& in,
                                             const CombineOutput& out, const Turn& turn,
                                             Share share) {
    const CombineTokens tokens = combine_tokens(view, out);
    Watch watch{view, Op::kCombine};
#pragma unroll 1
    for (int item = share.first;; item += share.step) {
        const int token = view.by_sums(item);
        if (token >= tokens.rows) return;
        const int unit = item - token * view.sums;
        const int lines = sum_lines(view, unit);
        const int32_t* sent = out.routing.sent + static_cast<int64_t>(token) * view.num_ranks;
        SumUnit row{};
        if (token < tokens.valid &&
            !gather_sums<kOwn, kWeights>(view, in, watch, sent, unit, lines, turn, row)) {
            return;
        }
        auto* to = reinterpret_cast<uint8_t*>(out.out + static_cast<int64_t>(token) * view.hidden) +
                   unit * kSumBytes;
#pragma unroll
        for (int j = 0; j < SumUnit::kVectors; ++j) {
            if (!SumUnit::has_data(j, lines)) continue;
            *reinterpret_cast<ptx::Vector*>(to + unit_byte(j)) = row.v[j];
        }
    }
}

// Sums that travel as BF16, as the kernels take them (combine_halves.cuh).
struct Bf16Sums {
    template <OwnRows kOwn, Weights kWeights>
    static __device__ __forceinline__ void send(const View& view, const CombineInput& in,
                                                const Turn& turn, Share share) {
        send_sums<kOwn, kWeights>(view, in, turn, share);
    }
    template <OwnRows kOwn, Weights kWeights>
    static __device__ __forceinline__ void receive(const View& view, const CombineInput& in,
                                                   const CombineOutput& out, const Turn& turn,
                                                   Share share) {
        receive_sums<kOwn, kWeights>(view, in, out, turn, share);
    }
};

}  // namespace ep

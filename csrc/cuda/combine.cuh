// Combine: the expert's rank adds up its rows of each message and sends the sum home; the source
// adds what its ranks sent.
//
// Both sides work on units of a row, one warp each, or, where there are few, on halves of units:
// `Unit` is SumUnit or HalfUnit. Sums are FP32 in a fixed order (k, then rank),
// rounded to BF16 once at the sender and once at home. (Sums that travel as FP8: combine_fp8.cuh.)
#pragma once

#include "cuda/combine_rows.cuh"
#include "cuda/late_weights.cuh"
#include "cuda/units.cuh"

namespace ep {

// Whether a rank's sum for its own tokens goes through its inbox, as those for others do, or is
// worked out by the receive. The inbox lets the caller reuse y between the send and the receive;
// without it there is less to move.
enum class OwnRows { kThroughInbox, kDirect };

// A lane's vectors of a unit, as sums.
template <class Unit>
struct Sum {
    Sum8 of[Unit::kVectors];

    __device__ __forceinline__ void add(const Unit& unit) {
#pragma unroll
        for (int j = 0; j < Unit::kVectors; ++j) of[j].add(1.0f, unit.v[j]);
    }
    __device__ __forceinline__ Unit rounded() const {
        Unit out;
#pragma unroll
        for (int j = 0; j < Unit::kVectors; ++j) out.v[j] = of[j].vector();
        return out;
    }
};

__device__ __forceinline__ int sum_lines(const View& view, int unit) {
    return min(kSumDataLines, view.sum_lines - unit * kSumDataLines);
}

// A unit of a message's weighted sum, rounded: lane k holds the weight of entry k of its list.
// Whole warps.
template <class Unit>
__device__ __forceinline__ Unit sum_message(const CombineInput& in, RowRef ref, float weight,
                                            int unit, typename Unit::Extent extent) {
    int byte[Unit::kVectors];
#pragma unroll
    for (int j = 0; j < Unit::kVectors; ++j) {
        byte[j] = Unit::adds(j, extent) ? unit * kSumBytes + Unit::row_byte(j, extent) : 0;
    }
    Sum<Unit> sum;
    add_rows<Unit>(in, ref, weight, byte, sum.of);
    return sum.rounded();
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

// What a warp that sends asks for first: its first item's rows, and how many messages came.
struct FirstItem {
    SendItem item;
    RowRef ref;
    int received;  // from rank `lane`

    template <OwnRows kOwn>
    __device__ __forceinline__ void load(const View& view, const CombineInput& in, Share share) {
        item = SendItem::of<kOwn>(view, share.first);
        load_ref(view, in);
        received = lane_id() < view.num_ranks ? in.routing.received[lane_id()] : 0;
    }
    __device__ __forceinline__ void load_ref(const View& view, const CombineInput& in) {
        ref = item.slot < view.max_tokens ? ep::load_ref(view, in.routing, item.source, item.slot)
                                          : RowRef{-1, 0.0f};
    }
    // Most messages of one source in the handle's dispatch. Whole warps.
    __device__ __forceinline__ int most_received(const View& view, const Routing& routing) const {
        int most = received;
#pragma unroll 1
        for (int s = 32 + lane_id(); s < view.num_ranks; s += 32) {
            most = max(most, routing.received[s]);
        }
        return __reduce_max_sync(kFullWarp, most);
    }
};

// Calls each(item, ref) for a warp's share of what is to be sent, until that says false: it gave
// up. `next`: has loaded the first. Rows of an item are asked for an item ahead. Whole warps.
template <OwnRows kOwn, class Each>
__device__ __forceinline__ void each_item(const View& view, const CombineInput& in,
                                          const Turn& turn, Share share, FirstItem next,
                                          Each each) {
    if (kOwn == OwnRows::kDirect && view.num_ranks == 1) return;
    if (turn.given_up()) return;
    const int most = next.most_received(view, in.routing);
#pragma unroll 1
    for (int i = share.first; next.item.slot < most;) {
        const SendItem now = next.item;
        const RowRef ref = next.ref;
        next.item = SendItem::of<kOwn>(view, i += share.step);
        next.load_ref(view, in);
        if (now.slot >= in.routing.received[now.source]) continue;
        if (turn.absent.has(view, now.source)) continue;
        if (!each(now, ref)) return;
    }
}

// The CTAs that send. Pairs with await_unit at each message's source. Warps that gave up leave one
// by one: no barrier follows, and the abort word stops whatever comes next.
template <class Unit, OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ void send_sums(const View& view, const CombineInput& in,
                                          const Turn& turn, Share share, int part,
                                          const FirstItem& first) {
    Watch watch{view, Op::kCombine};
    each_item<kOwn>(view, in, turn, share, first, [&](const SendItem& item, RowRef ref) {
        float weight;
        if (!await_weight<kWeights>(view, ref, watch, item.source, turn.epoch, weight)) {
            return false;
        }
        const auto extent = Unit::extent(sum_lines(view, item.unit), part);
        auto out = sum_message<Unit>(in, ref, weight, item.unit, extent);
        out.pack(turn.epoch);
        store_unit(out,
                   view.peer[item.source] + view.combine_out + view.combine_at(turn.epoch) +
                       static_cast<int64_t>(item.slot) * view.combine_stride +
                       item.unit * kSumLines * kLineBytes,
                   extent);
        return true;
    });
}

// Adds what the ranks sent for one unit of a token, in rank order. `sent` [R]: the token's slots.
// Whole warps; false: gave up.
template <OwnRows kOwn, Weights kWeights, class Unit>
__device__ __forceinline__ bool gather_sums(const View& view, const CombineInput& in, Watch& watch,
                                            const int32_t* sent, int unit,
                                            typename Unit::Extent extent, const Turn& turn,
                                            Unit& out) {
    const uint64_t epoch = turn.epoch;
    const uint8_t* inbox = view.combine_in + view.combine_at(epoch) + unit * kSumLines * kLineBytes;
    Unit own;
    if (kOwn == OwnRows::kDirect) {
        const int slot = turn.absent.has(view, view.rank) ? -1 : sent[view.rank];
        if (slot >= 0) {
            const RowRef ref = load_ref(view, in.routing, view.rank, slot);
            const float weight = own_weight<kWeights>(view, in, ref);
            // Rounded as if it had travelled.
            own = sum_message<Unit>(in, ref, weight, unit, extent);
        }
    }
    Sum<Unit> sum;  // not before: registers would not do
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
            Unit row;  // one at a time: two would cost registers, and were slower
            if (!await_unit(watch, from, peer, extent, epoch, row)) return false;
            row.unpack(extent);
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
template <class Unit, OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ void receive_sums(const View& view, const CombineInput& in,
                                             const CombineOutput& out, const Turn& turn,
                                             Share share, int part) {
    if (turn.given_up()) return;
    const CombineTokens tokens = combine_tokens(view, out);
    Watch watch{view, Op::kCombine};
#pragma unroll 1
    for (int item = share.first;; item += share.step) {
        const int token = view.by_sums(item);
        if (token >= tokens.rows) return;
        const int unit = item - token * view.sums;
        const auto extent = Unit::extent(sum_lines(view, unit), part);
        const int32_t* sent = out.routing.sent + static_cast<int64_t>(token) * view.num_ranks;
        Unit row{};
        if (token < tokens.valid &&
            !gather_sums<kOwn, kWeights>(view, in, watch, sent, unit, extent, turn, row)) {
            return;
        }
        auto* to = reinterpret_cast<uint8_t*>(out.out + static_cast<int64_t>(token) * view.hidden) +
                   unit * kSumBytes;
#pragma unroll
        for (int j = 0; j < Unit::kVectors; ++j) {
            if (!Unit::has_data(j, extent)) continue;
            *reinterpret_cast<ptx::Vector*>(to + Unit::row_byte(j, extent)) = row.v[j];
        }
    }
}

// Sums that travel as BF16, as the kernels take them (combine_halves.cuh).
template <class Unit>
struct Bf16SumsBy {
    static constexpr int kParts = Unit::kParts;

    template <OwnRows kOwn, Weights kWeights>
    static __device__ __forceinline__ void send(const View& view, const CombineInput& in,
                                                const Turn& turn, Share share,
                                                const FirstItem& first) {
        send_sums<Unit, kOwn, kWeights>(view, in, turn, share.units<kParts>(), share.part<kParts>(),
                                        first);
    }
    template <OwnRows kOwn, Weights kWeights>
    static __device__ __forceinline__ void receive(const View& view, const CombineInput& in,
                                                   const CombineOutput& out, const Turn& turn,
                                                   Share share) {
        receive_sums<Unit, kOwn, kWeights>(view, in, out, turn, share.units<kParts>(),
                                           share.part<kParts>());
    }
};
using Bf16Sums = Bf16SumsBy<SumUnit>;
using Bf16HalfSums = Bf16SumsBy<HalfUnit>;
using Bf16StreamedSums = Bf16SumsBy<StreamedUnit>;

}  // namespace ep

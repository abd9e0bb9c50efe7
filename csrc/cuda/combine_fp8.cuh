// Sums that travel as FP8: units of dispatch, whose lines hold 128 channels and have a scale each,
// so that a warp rounds a unit, or adds one up, without the others.
#pragma once

#include "cuda/combine.cuh"
#include "cuda/quantise.cuh"

namespace ep {

static_assert(kUnitBytes * 2 == kSumBytes);  // the same channels in a unit, so the same SendItems

// A lane's channels of a unit: sixteen of a line for each vector of the unit.
struct UnitSum {
    static constexpr int kVectors = 2 * RowUnit::kVectors;  // of BF16
    static constexpr int kRowsAtOnce = SumUnit::kRowsAtOnce;
    Sum8 of[kVectors];

    static __device__ __forceinline__ ptx::Vector load_row(const uint8_t* from) {
        return SumUnit::load_row(from);
    }
    // Where a lane's BF16 vector lies in a row.
    static __device__ __forceinline__ int byte(int unit, int vector) {
        return unit * kSumBytes + 2 * unit_byte(vector / 2) + 16 * (vector % 2);
    }
    static __device__ __forceinline__ bool has(int vector, int lines) {
        return line_of(vector / 2) < lines;
    }
};

__device__ __forceinline__ int fp8_lines(const View& view, int unit) {
    return min(kUnitDataLines, view.hidden / kScaleGroup - unit * kUnitDataLines);
}

// A unit as it travels, but for tags and displaced granules.
struct Fp8Sum {
    RowUnit unit;
    uint32_t scale[RowUnit::kVectors];

    static __device__ __forceinline__ Fp8Sum rounded(const UnitSum& sum) {
        Fp8Sum out;
#pragma unroll
        for (int j = 0; j < RowUnit::kVectors; ++j) {
            const Sum8 &a = sum.of[2 * j], &b = sum.of[2 * j + 1];
            const Fp8Scale s = fp8_scale(line_amax(a, b), false);
            out.unit.v[j] = {quantise(a, s.inverse), quantise(b, s.inverse)};
            out.scale[j] = float_to_bits(s.scale);
        }
        return out;
    }
    // acc = scale * value + acc, rounded once: the host backend does the same.
    __device__ __forceinline__ void add_to(UnitSum& sum) const {
#pragma unroll
        for (int j = 0; j < RowUnit::kVectors; ++j) {
            add_values(unit.v[j].lo, bits_to_float(scale[j]), sum.of[2 * j]);
            add_values(unit.v[j].hi, bits_to_float(scale[j]), sum.of[2 * j + 1]);
        }
    }
    __device__ __forceinline__ void unpack() {
#pragma unroll
        for (int j = 0; j < RowUnit::kVectors; ++j) scale[j] = unit.scale_of(j);
        unit.unpack();
    }

  private:
    // Largest magnitude of sixteen sums, then over the eight lanes of a line. Not of NaNs. Whole
    // warps.
    static __device__ __forceinline__ float line_amax(const Sum8& a, const Sum8& b) {
        float most = kMinSumAmax;
#pragma unroll
        for (int i = 0; i < 8; ++i) most = fmaxf(most, fmaxf(fabsf(a.f[i]), fabsf(b.f[i])));
#pragma unroll
        for (int step = 4; step > 0; step /= 2) {
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, step));
        }
        return most;
    }
    static __device__ __forceinline__ uint64_t quantise(const Sum8& s, float inverse) {
        uint64_t values = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 two =
                make_float2(__fmul_rn(s.f[2 * i], inverse), __fmul_rn(s.f[2 * i + 1], inverse));
            const uint64_t pair = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
            values |= pair << (16 * i);
        }
        return values;
    }
    static __device__ __forceinline__ void add_values(uint64_t values, float scale, Sum8& acc) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const ptx::Two two = ptx::unpack_fp8x2(static_cast<uint16_t>(values >> (16 * i)));
            acc.f[2 * i] = __fmaf_rn(scale, two.lo, acc.f[2 * i]);
            acc.f[2 * i + 1] = __fmaf_rn(scale, two.hi, acc.f[2 * i + 1]);
        }
    }
};

// A unit of a message's weighted sum, rounded: lane k holds the weight of entry k of its list.
// Whole warps.
__device__ __forceinline__ Fp8Sum sum_unit(const View& view, const CombineInput& in, RowRef ref,
                                           float weight, int unit) {
    const int lines = fp8_lines(view, unit);
    int byte[UnitSum::kVectors];
#pragma unroll
    for (int j = 0; j < UnitSum::kVectors; ++j) {
        byte[j] = UnitSum::has(j, lines) ? UnitSum::byte(unit, j) : 0;
    }
    UnitSum sum;
    add_rows<UnitSum>(in, ref, weight, byte, sum.of);
    return Fp8Sum::rounded(sum);
}

// Adds what the ranks sent for one unit of a token, in rank order. `sent` [R]: the token's slots.
// Whole warps; false: gave up.
template <OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ bool gather_unit(const View& view, const CombineInput& in, Watch& watch,
                                            const int32_t* sent, int unit, const Turn& turn,
                                            ptx::Vector (&out)[UnitSum::kVectors]) {
    const uint64_t epoch = turn.epoch;
    const uint8_t* inbox =
        view.combine_in + view.combine_at(epoch) + unit * kUnitLines * kLineBytes;
    Fp8Sum own;
    if (kOwn == OwnRows::kDirect) {
        const int slot = turn.absent.has(view, view.rank) ? -1 : sent[view.rank];
        if (slot >= 0) {
            const RowRef ref = load_ref(view, in.routing, view.rank, slot);
            const float weight = own_weight<kWeights>(view, in, ref);
            // Rounded as if it had travelled.
            own = sum_unit(view, in, ref, weight, unit);
        }
    }
    UnitSum sum;  // not before: registers would not do
#pragma unroll 1
    for (int r = 0; r < view.num_ranks; ++r) {
        const int slot = turn.absent.has(view, r) ? -1 : sent[r];
        if (slot < 0) continue;
        if (kOwn == OwnRows::kDirect && r == view.rank) {
            own.add_to(sum);
            continue;
        }
        const int64_t at = static_cast<int64_t>(r * view.max_tokens + slot);
        const uint8_t* from = inbox + at * view.combine_stride;
        Fp8Sum row;
        if (!await_unit(watch, from, r, fp8_lines(view, unit), epoch, row.unit)) return false;
        row.unpack();
        row.add_to(sum);
    }
#pragma unroll
    for (int j = 0; j < UnitSum::kVectors; ++j) out[j] = sum.of[j].vector();
    return true;
}

// As the kernels take them (combine_halves.cuh): every warp works alone, on one unit.
struct Fp8Sums {
    static constexpr int kParts = 1;

    // Pairs with await_unit at each message's source. Warps that gave up leave one by one.
    template <OwnRows kOwn, Weights kWeights>
    static __device__ __forceinline__ void send(const View& view, const CombineInput& in,
                                                const Turn& turn, Share share,
                                                const FirstItem& first) {
        Watch watch{view, Op::kCombine};
        each_item<kOwn>(view, in, turn, share, first, [&](const SendItem& item, RowRef ref) {
            float weight;
            if (!await_weight<kWeights>(view, ref, watch, item.source, turn.epoch, weight)) {
                return false;
            }
            Fp8Sum out = sum_unit(view, in, ref, weight, item.unit);
            out.unit.pack(out.scale, turn.epoch);
            uint8_t* to = view.peer[item.source] + view.combine_out + view.combine_at(turn.epoch) +
                          static_cast<int64_t>(item.slot) * view.combine_stride +
                          item.unit * kUnitLines * kLineBytes;
            store_unit(out.unit, to, fp8_lines(view, item.unit));
            return true;
        });
    }

    // Padding rows and tokens without experts become zeros.
    template <OwnRows kOwn, Weights kWeights>
    static __device__ __forceinline__ void receive(const View& view, const CombineInput& in,
                                                   const CombineOutput& out, const Turn& turn,
                                                   Share share) {
        if (turn.given_up()) return;
        const CombineTokens tokens = combine_tokens(view, out);
        Watch watch{view, Op::kCombine};
#pragma unroll 1
        for (int item = share.first;; item += share.step) {
            const int token = view.by_sums(item);
            if (token >= tokens.rows) return;
            const int unit = item - token * view.sums;
            const int32_t* sent = out.routing.sent + static_cast<int64_t>(token) * view.num_ranks;
            ptx::Vector result[UnitSum::kVectors] = {};
            if (token < tokens.valid &&
                !gather_unit<kOwn, kWeights>(view, in, watch, sent, unit, turn, result)) {
                return;
            }
            auto* row =
                reinterpret_cast<uint8_t*>(out.out) + static_cast<int64_t>(token) * view.hidden * 2;
            const int lines = fp8_lines(view, unit);
#pragma unroll
            for (int j = 0; j < UnitSum::kVectors; ++j) {
                if (!UnitSum::has(j, lines)) continue;
                *reinterpret_cast<ptx::Vector*>(row + UnitSum::byte(unit, j)) = result[j];
            }
        }
    }
};

}  // namespace ep

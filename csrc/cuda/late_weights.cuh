// Weights that come with the combine instead of the dispatch: every rank sends its [T, K] table
// ahead of the rows, as tagged lines, and whoever adds up a message waits for the line or two that
// hold its token's.
#pragma once

#include "cuda/kernels.h"
#include "cuda/lines.cuh"
#include "ep/fp8.h"

namespace ep {

inline constexpr int kFloatsPerLine = kLinePayload / 4;

// All CTAs. The table goes to everybody, this rank included.
__device__ __noinline__ inline void push_weights(const View& view, const CombineInput& in,
                                                 Turn turn) {
    const int tokens = min(in.num_tokens, view.max_tokens);
    const int floats = tokens * view.topk;
    const int vectors = (floats + kFloatsPerLine - 1) / kFloatsPerLine * kVectorsPerLine;
    const auto at = [&](int i) { return i < floats ? in.weights[i] : 0.0f; };
    const auto granule = [&](int g) {
        return static_cast<uint64_t>(float_to_bits(at(2 * g))) |
               (static_cast<uint64_t>(float_to_bits(at(2 * g + 1))) << 32);
    };
#pragma unroll 1
    for (int v = blockIdx.x * kCombineThreads + threadIdx.x; v < vectors;
         v += static_cast<int>(gridDim.x) * kCombineThreads) {
        const int g = first_granule(v);
        const ptx::Vector vector{granule(g), holds_tag(v) ? turn.epoch : granule(g + 1)};
#pragma unroll 1
        for (int r = 0; r < view.num_ranks; ++r) {
            if (turn.absent.has(view, r)) continue;
            ptx::store_line_vector(view.peer[r] + view.weights_out + 16 * v, vector);
        }
    }
}

// One token's weights in the registers of a warp: float k of the token at lane k.
struct LateWeights {
    float mine;

    // Whole warps; false: gave up. K floats lie in at most three lines: lanes 0 to 23 load them.
    __device__ __noinline__ bool load(const View& view, const CombineInput& in, Watch& watch,
                                      int source, int slot, uint64_t epoch) {
        const int lane = threadIdx.x & 31;
        const int token = in.routing.tokens[source * view.max_tokens + slot];
        const int first = token * view.topk;
        const int first_line = first / kFloatsPerLine;
        const int last_line = (first + view.topk - 1) / kFloatsPerLine;
        const int line = first_line + lane / kVectorsPerLine;
        const uint8_t* table = view.weights_in + static_cast<int64_t>(source) * view.weights_stride;
        const bool mine_too = lane < 3 * kVectorsPerLine && line <= last_line;
        const uint8_t* from[1] = {mine_too ? table + static_cast<int64_t>(line) * kLineBytes +
                                                 16 * (lane % kVectorsPerLine)
                                           : nullptr};
        const int peers[1] = {source};
        ptx::Vector v[1] = {};
        if (!await_vectors<1>(watch, from, peers, holds_tag(lane), epoch, v)) return false;

        const int wanted = first + min(lane, view.topk - 1);
        const int within = wanted - first_line * kFloatsPerLine;  // float of the three lines
        const int in_line = within % kFloatsPerLine;
        const int from_lane = within / kFloatsPerLine * kVectorsPerLine + in_line / 4;
        const uint64_t lo = __shfl_sync(kFullWarp, v[0].lo, from_lane);
        const uint64_t hi = __shfl_sync(kFullWarp, v[0].hi, from_lane);
        const uint64_t pair = (in_line & 2) != 0 ? hi : lo;
        mine = bits_to_float(static_cast<uint32_t>((in_line & 1) != 0 ? pair >> 32 : pair));
        return true;
    }

    // Of the lane's own reference, which holds k where the dispatch had no weights. Whole warps.
    __device__ __forceinline__ float of(const RowRef& ref) const {
        return __shfl_sync(kFullWarp, mine, static_cast<int>(float_to_bits(ref.weight)) & 31);
    }
};

}  // namespace ep

// Weights that come with the combine instead of the dispatch: every rank sends its [T, K] table
// ahead of the rows, as tagged lines, and whoever adds up a message waits for the line or two that
// hold its token's. Where the dispatch had no weights, an entry says in their place which float of
// the table its weight will be.
#pragma once

#include "cuda/kernels.h"
#include "cuda/lines.cuh"
#include "ep/fp8.h"

namespace ep {

inline constexpr int kFloatsPerLine = kLinePayload / 4;

// When weights came: with the dispatch, or with this combine.
enum class Weights { kKnown, kLate };

// This rank's table, of which a thread sends vectors. The first is asked for while the epoch is.
template <Weights kWeights>
struct OwnTable {
    __device__ __forceinline__ void ask(const View&, const CombineInput&) {}
    __device__ __forceinline__ void push(const View&, const CombineInput&, const Turn&,
                                         bool) const {}
};

template <>
struct OwnTable<Weights::kLate> {
    float first[4];  // as they lie in the thread's first vector

    __device__ __forceinline__ void ask(const View& view, const CombineInput& in) {
        load(floats(view, in), in, first_vector(), first);
    }
    // All CTAs: to every rank; to this one where it looks for its own there too.
    __device__ __forceinline__ void push(const View& view, const CombineInput& in, const Turn& turn,
                                         bool to_us) const {
        if (turn.given_up()) return;
        const int count = floats(view, in);
        const int vectors = (count + kFloatsPerLine - 1) / kFloatsPerLine * kVectorsPerLine;
        float now[4] = {first[0], first[1], first[2], first[3]};
#pragma unroll 1
        for (int v = first_vector(); v < vectors;) {
            const ptx::Vector vector{pack(now[0], now[1]),
                                     holds_tag(v) ? turn.epoch : pack(now[2], now[3])};
#pragma unroll 1
            for (int r = 0; r < view.num_ranks; ++r) {
                if ((r == view.rank && !to_us) || turn.absent.has(view, r)) continue;
                ptx::store_line_vector(view.peer[r] + view.weights_out + 16 * v, vector);
            }
            v += static_cast<int>(gridDim.x) * kCombineThreads;
            load(count, in, v, now);
        }
    }

  private:
    static __device__ __forceinline__ int floats(const View& view, const CombineInput& in) {
        return min(in.num_tokens, view.max_tokens) * view.topk;
    }
    static __device__ __forceinline__ int first_vector() {
        return static_cast<int>(blockIdx.x * kCombineThreads + threadIdx.x);
    }
    static __device__ __forceinline__ void load(int count, const CombineInput& in, int vector,
                                                float (&of)[4]) {
        const int from = 2 * first_granule(vector);
#pragma unroll
        for (int i = 0; i < 4; ++i) of[i] = from + i < count ? in.weights[from + i] : 0.0f;
    }
    static __device__ __forceinline__ uint64_t pack(float lo, float hi) {
        return static_cast<uint64_t>(float_to_bits(lo)) |
               (static_cast<uint64_t>(float_to_bits(hi)) << 32);
    }
};

// Which float of a table of so many tokens is that of the lane's entry; 0 behind the end of the
// list, where memory is what it was. A peer told us, so it is kept within. Whole warps.
__device__ __forceinline__ int table_index(const View& view, const RowRef& ref, int tokens) {
    const unsigned ended = __ballot_sync(kFullWarp, ref.row < 0);
    const bool listed = (ended & ((2u << (threadIdx.x & 31)) - 1)) == 0;
    const auto floats = static_cast<uint32_t>(tokens * view.topk);
    return listed ? static_cast<int>(min(float_to_bits(ref.weight), floats - 1)) : 0;
}

// The weights of a list of rows of this rank's own tokens, entry k at lane k; late ones where the
// caller has them. Whole warps.
template <Weights kWeights>
__device__ __forceinline__ float own_weight(const View& view, const CombineInput& in,
                                            const RowRef& ref) {
    if (kWeights == Weights::kKnown) return ref.weight;
    const int tokens = min(in.num_tokens, view.max_tokens);
    return tokens > 0 ? in.weights[table_index(view, ref, tokens)] : 0.0f;
}

// Those of another rank's tokens, or of this one's if it sent itself its table. Whole warps; false:
// gave up. To wait here, before any row is asked for, costs less than the registers that rows would
// occupy meanwhile (docs/performance.md).
template <Weights kWeights>
__device__ __forceinline__ bool await_weight(const View& view, const RowRef& ref, Watch& watch,
                                             int source, uint64_t epoch, float& weight) {
    weight = ref.weight;
    if (kWeights == Weights::kKnown) return true;
    const int lane = static_cast<int>(threadIdx.x & 31);
    const int index = table_index(view, ref, view.max_tokens);
    // K floats lie in at most three lines: lanes 0 to 23 load them. The list's first entry is its
    // lowest.
    const int first_line = __shfl_sync(kFullWarp, index, 0) / kFloatsPerLine;
    const int last_line = __reduce_max_sync(kFullWarp, index) / kFloatsPerLine;
    const int line = first_line + lane / kVectorsPerLine;
    const uint8_t* table = view.weights_in + static_cast<int64_t>(source) * view.weights_stride;
    const bool loads = lane < 3 * kVectorsPerLine && line <= last_line;
    const uint8_t* from[1] = {loads ? table + static_cast<int64_t>(line) * kLineBytes +
                                          16 * (lane % kVectorsPerLine)
                                    : nullptr};
    const int peers[1] = {source};
    ptx::Vector v[1] = {};
    if (!await_vectors<1>(watch, from, peers, holds_tag(lane), epoch, v)) return false;

    const int within = max(0, index - first_line * kFloatsPerLine);  // float of the lines
    const int in_line = within % kFloatsPerLine;
    const int holder = within / kFloatsPerLine * kVectorsPerLine + in_line / 4;
    const uint64_t lo = __shfl_sync(kFullWarp, v[0].lo, holder);
    const uint64_t hi = __shfl_sync(kFullWarp, v[0].hi, holder);
    const uint64_t pair = (in_line & 2) != 0 ? hi : lo;
    weight = bits_to_float(static_cast<uint32_t>((in_line & 1) != 0 ? pair >> 32 : pair));
    return true;
}

}  // namespace ep

// Adding up the rows of a message where the experts left them.
#pragma once

#include "cuda/kernels.h"
#include "cuda/sums.cuh"
#include "cuda/units.cuh"

namespace ep {

// Lane k: entry k of a message's list of rows.
__device__ __forceinline__ RowRef load_ref(const View& view, const Routing& routing, int source,
                                           int slot) {
    const int64_t message = source * view.max_tokens + slot;
    return lane_id() < view.topk ? routing.refs[message * view.topk + lane_id()] : RowRef{-1, 0.0f};
}

// Adds entries [first, first + kRows) of a message's list. All loads come before the first sum, and
// no branch parts them: behind one, what was loaded first would wait in memory
// (docs/performance.md).
template <class Unit, int kRows, int kVectors>
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
            x[i][j] = Unit::load_row(from + byte[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const float w = __shfl_sync(kFullWarp, weight, first + i);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sum[j].add(w, x[i][j]);
    }
}

// Adds the first `count` entries of a message's list, between kLeast and kMost, to nothing. All are
// on their way before the first sum: for entries that the list lacks its last one is loaded again,
// and not added. One body of code serves several counts, since what a warp runs once must be
// fetched for it.
template <int kLeast, int kMost, int kVectors>
__device__ __forceinline__ void add_first(const CombineInput& in, RowRef ref, float weight,
                                          int count, const int (&byte)[kVectors],
                                          Sum8 (&sum)[kVectors]) {
    const uint64_t row = reinterpret_cast<uintptr_t>(in.y) +
                         2 * static_cast<uint64_t>(ref.row) * static_cast<uint64_t>(in.row_stride);
    ptx::Vector x[kMost][kVectors];
    float w[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        const int k = i < kLeast ? i : min(i, count - 1);
        const uint64_t from = __shfl_sync(kFullWarp, row, k);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            x[i][j] = ptx::load_vector_now(reinterpret_cast<const void*>(from + byte[j]));
        }
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) w[i] = __shfl_sync(kFullWarp, weight, i);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        if (i >= kLeast && i >= count) break;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sum[j].add(w[i], x[i][j]);
    }
}

// Adds the rows of a message's list to nothing. The first kRowsAtOnce are there after one way to
// memory and back, which takes longer than all the rest; others come two at a time. Lane k holds
// the weight of entry k. `byte`: where each of the lane's vectors lies in a row; lanes that have no
// data there give any place in it, and nobody uses their sums. Whole warps.
template <class Unit, int kVectors>
__device__ __forceinline__ void add_rows(const CombineInput& in, RowRef ref, float weight,
                                         const int (&byte)[kVectors], Sum8 (&sum)[kVectors]) {
    const int listed = __ffs(__ballot_sync(kFullWarp, ref.row < 0)) - 1;
    const int end = listed < 0 ? 32 : listed;
    int k = 0;
    constexpr int kAtOnce = Unit::kRowsAtOnce;
    if constexpr (kAtOnce > 2) {
        k = min(end, kAtOnce);
        if (k > kAtOnce / 2) {
            add_first<kAtOnce / 2 + 1, kAtOnce>(in, ref, weight, k, byte, sum);
        } else if (k > 0) {
            add_first<1, kAtOnce / 2>(in, ref, weight, k, byte, sum);
        }
    }
#pragma unroll 1
    for (; k + 2 <= end; k += 2) add_some<Unit, 2>(in, ref, weight, k, byte, sum);
    if (k < end) add_some<Unit, 1>(in, ref, weight, k, byte, sum);
}

}  // namespace ep

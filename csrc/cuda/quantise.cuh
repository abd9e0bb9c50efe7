// A row on its way into a message: as it is, or FP8 (csrc/ep/fp8.h has the formula).
//
// A lane takes pairs of vectors, sixteen BF16 channels that lie next to each other: eight lanes
// share a scale.
#pragma once

#include <cuda_fp8.h>

#include "cuda/watch.cuh"
#include "ep/fp8.h"

namespace ep {

struct Pair {
    uint4 v[2];

    // Vectors i and i + 1 of a row.
    __device__ __forceinline__ void load(const uint8_t* row, int i, int num_vectors) {
        const auto* from = reinterpret_cast<const uint4*>(row);
#pragma unroll
        for (int j = 0; j < 2; ++j) v[j] = i + j < num_vectors ? from[i + j] : uint4{};
    }
    __device__ __forceinline__ void store(uint8_t* to, int i, int num_vectors) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (i + j < num_vectors) reinterpret_cast<uint4*>(to)[i + j] = v[j];
        }
    }
};

// Largest magnitudes among a vector's channels, two in a word. (Magnitudes of BF16 order as
// integers.)
__device__ __forceinline__ uint32_t magnitudes(uint4 bf16x8) {
    constexpr uint32_t kMagnitudes = 0x7fff7fffu;
    return __vmaxu2(__vmaxu2(bf16x8.x & kMagnitudes, bf16x8.y & kMagnitudes),
                    __vmaxu2(bf16x8.z & kMagnitudes, bf16x8.w & kMagnitudes));
}

// Largest magnitude of the 128 channels that eight lanes hold (hidden is a multiple of 128, so all
// eight are there or none). Whole warps.
__device__ __forceinline__ float group_amax(const Pair& pair) {
    uint32_t most = __vmaxu2(magnitudes(pair.v[0]), magnitudes(pair.v[1]));
#pragma unroll
    for (int step = 4; step > 0; step /= 2) {
        most = __vmaxu2(most, __shfl_xor_sync(kFullWarp, most, step));
    }
    const uint32_t top = max(most >> 16, most & 0xffffu);
    return fmaxf(bits_to_float(top << 16), kMinAmax);
}

// Out of line: of rows so large that a reciprocal would be subnormal, and of infinite ones.
__device__ __noinline__ inline Fp8Scale scale_of_giants(float amax, bool round_scale) {
    return fp8_scale(amax, round_scale);
}

// fp8_scale, bit for bit, of an `amax` that is the magnitude of a BF16 or kMinAmax: quotients with
// one correction each, where a division would look for special cases first. (For all of them, with
// reciprocals up to two units wrong: tests/native/test_native_conversions.py.)
__device__ __forceinline__ Fp8Scale scale_of_group(float amax, bool round_scale) {
    if (!(amax <= kMostSimpleAmax)) return scale_of_giants(amax, round_scale);
    const float scale = quotient_by_fp8_max(amax);
    if (round_scale) return rounded_scale(scale);
    return {scale, fp8_max_quotient(amax, ptx::reciprocal(amax))};
}

__device__ __forceinline__ uint64_t quantise(uint4 bf16x8, float inverse) {
    const uint32_t words[4] = {bf16x8.x, bf16x8.y, bf16x8.z, bf16x8.w};
    uint32_t two[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float lo = __fmul_rn(bits_to_float(words[j] << 16), inverse);
        const float hi = __fmul_rn(bits_to_float(words[j] & 0xffff0000u), inverse);
        two[j] = __nv_cvt_float2_to_fp8x2(make_float2(lo, hi), __NV_SATFINITE, __NV_E4M3);
    }
    const uint64_t low = two[0] | (two[1] << 16);
    const uint64_t high = two[2] | (two[3] << 16);
    return low | (high << 32);
}

// Vectors i and i + 1 of a row as FP8, with the scale of their group. `amax`: group_amax of them.
__device__ __forceinline__ void stage_fp8(uint8_t* to, float* scales, int i, const Pair& pair,
                                          float amax, bool round_scale) {
    const Fp8Scale scale = scale_of_group(amax, round_scale);
    reinterpret_cast<ptx::Vector*>(to)[i / 2] = {quantise(pair.v[0], scale.inverse),
                                                 quantise(pair.v[1], scale.inverse)};
    if ((i & 15) == 0) scales[i / 16] = scale.scale;
}

// A row in registers: pair j * kRowThreads + thread. Whole warps.
template <int kRowPairs>
struct RowRegisters {
    Pair pair[kRowPairs];

    static __device__ __forceinline__ int first_vector(int j) {
        return 2 * (j * kRowThreads + static_cast<int>(threadIdx.x));
    }
    __device__ __forceinline__ void load(const uint8_t* row, int num_vectors) {
#pragma unroll
        for (int j = 0; j < kRowPairs; ++j) pair[j].load(row, first_vector(j), num_vectors);
    }

    // Into the row part of a message as it is.
    __device__ __forceinline__ void stage(uint8_t* to, int num_vectors) const {
#pragma unroll
        for (int j = 0; j < kRowPairs; ++j) pair[j].store(to, first_vector(j), num_vectors);
    }

    // As FP8, with its scales.
    __device__ __forceinline__ void stage_fp8(uint8_t* to, float* scales, int num_vectors,
                                              bool round_scale) const {
        float amax[kRowPairs];
#pragma unroll
        for (int j = 0; j < kRowPairs; ++j) amax[j] = group_amax(pair[j]);
#pragma unroll
        for (int j = 0; j < kRowPairs; ++j) {
            const int i = first_vector(j);
            if (i < num_vectors) ep::stage_fp8(to, scales, i, pair[j], amax[j], round_scale);
        }
    }
};

}  // namespace ep

// A row on its way into a message: as it is, or FP8 (csrc/ep/fp8.h has the formula).
#pragma once

#include <cuda_fp8.h>

#include "cuda/watch.cuh"
#include "ep/fp8.h"

namespace ep {

// Largest magnitude of eight channels; then over the sixteen threads that share a scale (hidden is
// a multiple of 128, so all sixteen are there or none). Whole warps.
__device__ __forceinline__ float group_amax(uint4 bf16x8) {
    // Magnitudes of BF16 order as integers: two a word, compared at once.
    constexpr uint32_t kMagnitudes = 0x7fff7fffu;
    uint32_t most = __vmaxu2(__vmaxu2(bf16x8.x & kMagnitudes, bf16x8.y & kMagnitudes),
                             __vmaxu2(bf16x8.z & kMagnitudes, bf16x8.w & kMagnitudes));
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        most = __vmaxu2(most, __shfl_xor_sync(kFullWarp, most, step));
    }
    const uint32_t top = max(most >> 16, most & 0xffffu);
    return fmaxf(bits_to_float(top << 16), kMinAmax);
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

// A row in registers: vector j * kStagingThreads + thread, eight BF16 channels each. Whole warps.
template <int kRowVectors>
struct RowRegisters {
    uint4 v[kRowVectors];

    __device__ __forceinline__ void load(const uint8_t* row, int num_vectors) {
        const auto* from = reinterpret_cast<const uint4*>(row);
#pragma unroll
        for (int j = 0; j < kRowVectors; ++j) {
            const int i = j * kStagingThreads + threadIdx.x;
            v[j] = i < num_vectors ? from[i] : uint4{};
        }
    }

    // Into the row part of a message as it is.
    __device__ __forceinline__ void stage(uint8_t* to, int num_vectors) const {
#pragma unroll
        for (int j = 0; j < kRowVectors; ++j) {
            const int i = j * kStagingThreads + threadIdx.x;
            if (i < num_vectors) reinterpret_cast<uint4*>(to)[i] = v[j];
        }
    }

    // As FP8, with its scales.
    __device__ __forceinline__ void stage_fp8(uint8_t* to, float* scales, int num_vectors,
                                              bool round_scale) const {
        float amax[kRowVectors];
#pragma unroll
        for (int j = 0; j < kRowVectors; ++j) amax[j] = group_amax(v[j]);
#pragma unroll
        for (int j = 0; j < kRowVectors; ++j) {
            const int i = j * kStagingThreads + threadIdx.x;
            if (i >= num_vectors) continue;
            const Fp8Scale scale = fp8_scale(amax[j], round_scale);
            reinterpret_cast<uint64_t*>(to)[i] = quantise(v[j], scale.inverse);
            if ((i & 15) == 0) scales[i / 16] = scale.scale;
        }
    }
};

}  // namespace ep

// Sums of BF16 rows in FP32.
#pragma once

#include "cuda/ptx.cuh"
#include "ep/fp8.h"

namespace ep {

// Eight channels' sums: one vector of a row.
struct Sum8 {
    float f[8] = {};

    // acc = w * x + acc, each rounded once: the host backend does the same.
    __device__ __forceinline__ void add(float w, ptx::Vector x) {
        const uint32_t words[4] = {static_cast<uint32_t>(x.lo), static_cast<uint32_t>(x.lo >> 32),
                                   static_cast<uint32_t>(x.hi), static_cast<uint32_t>(x.hi >> 32)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            f[2 * j] = __fmaf_rn(w, bits_to_float(words[j] << 16), f[2 * j]);
            f[2 * j + 1] = __fmaf_rn(w, bits_to_float(words[j] & 0xffff0000u), f[2 * j + 1]);
        }
    }
    __device__ __forceinline__ uint64_t granule(int g) const {
        const uint64_t lo = ptx::pack_bf16x2(f[4 * g], f[4 * g + 1]);
        const uint64_t hi = ptx::pack_bf16x2(f[4 * g + 2], f[4 * g + 3]);
        return lo | (hi << 32);
    }
    __device__ __forceinline__ ptx::Vector vector() const { return {granule(0), granule(1)}; }
};

}  // namespace ep

// The conversion that csrc/cuda takes from CUDA's header of this name.
#pragma once

#include "emulator/emulator.h"
#include "ep/fp8.h"

struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
enum Saturation { __NV_SATFINITE };
enum Interpretation { __NV_E4M3 };

inline uint16_t __nv_cvt_float2_to_fp8x2(float2 v, Saturation, Interpretation) {
    return static_cast<uint16_t>(ep::float_to_fp8(v.x) | ep::float_to_fp8(v.y) << 8);
}

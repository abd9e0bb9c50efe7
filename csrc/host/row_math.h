// Arithmetic over rows, compiled for the baseline and, on x86, for AVX2 with FMA; same bits in
// both.
#pragma once

#include <cstdint>

namespace ep::host {

struct RowMath {
    // BF16 [n] -> FP8 [n] and float [n / 128] scales (ep/fp8.h). n: a multiple of 128.
    void (*quantise)(const uint16_t* row, int n, uint8_t* values, float* scales, bool round_scale);
    // sum += weight * row, one rounding (fused).
    void (*multiply_add)(float weight, const uint16_t* row, int n, float* sum);
    // sum += row.
    void (*add)(const uint16_t* row, int n, float* sum);
    // FP32 [n] -> FP8 [n] and float [n / 128] scales; sum += what they stand for, fused.
    void (*quantise_sum)(const float* sum, int n, uint8_t* values, float* scales);
    void (*add_fp8)(const uint8_t* values, const float* scales, int n, float* sum);
    // FP32 [n] -> BF16 [n].
    void (*round)(const float* sum, int n, uint16_t* row);
};

const RowMath& portable_row_math();
// The fastest version for this processor.
const RowMath& row_math();

}  // namespace ep::host

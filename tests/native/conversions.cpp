// The row arithmetic of the host backend behind C functions, so that a test can call it on arrays.
#include <cstdint>

#include "ep/fp8.h"
#include "host/row_math.h"

namespace {
const ep::host::RowMath& math(int portable) {
    return portable ? ep::host::portable_row_math() : ep::host::row_math();
}
}  // namespace

extern "C" {

void floats_to_fp8(const float* in, int n, uint8_t* out) {
    for (int i = 0; i < n; ++i) out[i] = ep::float_to_fp8(in[i]);
}
void floats_to_bf16(const float* in, int n, uint16_t* out) {
    for (int i = 0; i < n; ++i) out[i] = ep::float_to_bf16(in[i]);
}
void bf16_to_floats(const uint16_t* in, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = ep::bf16_to_float(in[i]);
}
void group_quotients(const float* amax, const float* reciprocal, int n, float* scale,
                     float* inverse) {
    for (int i = 0; i < n; ++i) {
        scale[i] = ep::quotient_by_fp8_max(amax[i]);
        inverse[i] = ep::fp8_max_quotient(amax[i], reciprocal[i]);
    }
}
void quantise(int portable, const uint16_t* row, int n, uint8_t* values, float* scales) {
    math(portable).quantise(row, n, values, scales, /*round_scale=*/false);
}
void quantise_sum(int portable, const float* sum, int n, uint8_t* values, float* scales) {
    math(portable).quantise_sum(sum, n, values, scales);
}
void add_fp8(int portable, const uint8_t* values, const float* scales, int n, float* sum) {
    math(portable).add_fp8(values, scales, n, sum);
}
void multiply_add(int portable, float weight, const uint16_t* row, int n, float* sum) {
    math(portable).multiply_add(weight, row, n, sum);
}
void add(int portable, const uint16_t* row, int n, float* sum) { math(portable).add(row, n, sum); }
void round_row(int portable, const float* sum, int n, uint16_t* row) {
    math(portable).round(sum, n, row);
}

}  // extern "C"

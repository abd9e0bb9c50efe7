#include "host/row_math.h"

#include <cmath>

#include "ep/fp8.h"
#include "ep/shape.h"

// Inlined into one function per instruction set, so that each is vectorised for its own.
#define EP_BODY static inline __attribute__((always_inline))

namespace ep::host {
namespace {

// float_to_fp8 without branches and without infinities or NaNs above it: those take the slow path.
EP_BODY uint8_t finite_to_fp8(float f) {
    const uint32_t u = float_to_bits(f);
    const uint32_t sign = (u >> 24) & 0x80u;
    const uint32_t magnitude = u & 0x7fffffffu;
    // An ulp of 2^14 is 2^-9, the step of e4m3 subnormals: this addition rounds to it.
    const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 16384.0f);
    const uint32_t subnormal = shifted - 0x46800000u;
    const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    const uint32_t normal = (rounded >> 20) - ((127u - 7u) << 3);
    const uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;  // 2^-6
    const uint32_t saturated = magnitude >= 0x43e00000u ? 0x7eu : code;  // 448
    return static_cast<uint8_t>(sign | saturated);
}

EP_BODY void quantise_body(const uint16_t* __restrict row, int n, uint8_t* __restrict values,
                           float* __restrict scales) {
    for (int start = 0; start < n; start += kScaleGroup) {
        const uint16_t* in = row + start;
        uint8_t* out = values + start;
        // Magnitudes of floats order as integers do; NaNs lie above infinity and count as nothing.
        uint32_t largest = 0;
        uint32_t special = 0;
        for (int i = 0; i < kScaleGroup; ++i) {
            const uint32_t magnitude = static_cast<uint32_t>(in[i] & 0x7fffu);
            special |= magnitude >= 0x7f80u ? 1u : 0u;
            const uint32_t number = magnitude > 0x7f80u ? 0u : magnitude;
            largest = number > largest ? number : largest;
        }
        const float amax = bits_to_float(largest << 16);
        const float clamped = amax > kMinAmax ? amax : kMinAmax;
        const float inverse = kFp8Max / clamped;
        if (special != 0) {
            for (int i = 0; i < kScaleGroup; ++i) {
                out[i] = float_to_fp8(bf16_to_float(in[i]) * inverse);
            }
        } else {
            for (int i = 0; i < kScaleGroup; ++i) {
                out[i] = finite_to_fp8(bf16_to_float(in[i]) * inverse);
            }
        }
        scales[start / kScaleGroup] = clamped / kFp8Max;
    }
}

EP_BODY void multiply_add_body(float weight, const uint16_t* __restrict row, int n,
                               float* __restrict sum) {
    for (int i = 0; i < n; ++i) sum[i] = __builtin_fmaf(weight, bf16_to_float(row[i]), sum[i]);
}

EP_BODY void add_body(const uint16_t* __restrict row, int n, float* __restrict sum) {
    for (int i = 0; i < n; ++i) sum[i] += bf16_to_float(row[i]);
}

EP_BODY void round_body(const float* __restrict sum, int n, uint16_t* __restrict row) {
    for (int i = 0; i < n; ++i) row[i] = float_to_bf16(sum[i]);
}

#define EP_ROW_MATH(NAME, TARGET)                                                                 \
    TARGET void NAME##_quantise(const uint16_t* row, int n, uint8_t* values, float* scales) {     \
        quantise_body(row, n, values, scales);                                                    \
    }                                                                                             \
    TARGET void NAME##_multiply_add(float weight, const uint16_t* row, int n, float* sum) {       \
        multiply_add_body(weight, row, n, sum);                                                   \
    }                                                                                             \
    TARGET void NAME##_add(const uint16_t* row, int n, float* sum) { add_body(row, n, sum); }     \
    TARGET void NAME##_round(const float* sum, int n, uint16_t* row) { round_body(sum, n, row); } \
    constexpr RowMath NAME{NAME##_quantise, NAME##_multiply_add, NAME##_add, NAME##_round};

EP_ROW_MATH(kPortable, )
#if defined(__x86_64__)
EP_ROW_MATH(kAvx2, __attribute__((target("avx2,fma"))))
#endif

const RowMath& choose() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kPortable;
}

}  // namespace

const RowMath& portable_row_math() { return kPortable; }

const RowMath& row_math() {
    static const RowMath& chosen = choose();
    return chosen;
}

}  // namespace ep::host

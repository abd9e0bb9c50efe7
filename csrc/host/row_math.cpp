#include "host/row_math.h"

#include <cmath>

#include "ep/fp8.h"
#include "ep/shape.h"

// Inlined into one function per instruction set, so that each is vectorised for its own.
#define EP_BODY static inline __attribute__((always_inline))

namespace ep::host {
namespace {

// float_to_fp8 for anything but infinities and NaNs, with masks in place of branches: a branch
// around the addition would keep compilers from vectorising.
EP_BODY uint8_t finite_to_fp8(float f) {
    const uint32_t u = float_to_bits(f);
    const uint32_t sign = (u >> 24) & 0x80u;
    const uint32_t magnitude = u & 0x7fffffffu;
    // An ulp of 2^14 is 2^-9, the step of e4m3 subnormals: this addition rounds to it.
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000u;
    const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    const uint32_t normal = (rounded >> 20) - ((127u - 7u) << 3);
    const uint32_t is_normal = 0u - static_cast<uint32_t>(magnitude >= 0x3c800000u);  // 2^-6
    const uint32_t code = (normal & is_normal) | (subnormal & ~is_normal);
    const uint32_t saturated = code < 0x7eu ? code : 0x7eu;
    return static_cast<uint8_t>(sign | saturated);
}

// Magnitudes of BF16 order as integers do. 0x7f80 is infinity; NaNs lie above it.
EP_BODY uint16_t largest_magnitude(const uint16_t* row, uint16_t limit) {
    uint16_t largest = 0;
    for (int i = 0; i < kScaleGroup; ++i) {
        const uint16_t magnitude = row[i] & 0x7fffu;
        const uint16_t counted = magnitude <= limit ? magnitude : 0;
        largest = counted > largest ? counted : largest;
    }
    return largest;
}

EP_BODY float quantise_group(const uint16_t* __restrict row, uint8_t* __restrict values,
                             bool round_scale) {
    constexpr uint16_t kInfinity = 0x7f80;
    const uint16_t largest = largest_magnitude(row, 0x7fff);
    const bool finite = largest < kInfinity;
    const float amax = bf16_to_float(finite ? largest : largest_magnitude(row, kInfinity));
    const float clamped = amax > kMinAmax ? amax : kMinAmax;
    const Fp8Scale scale = fp8_scale(clamped, round_scale);
    const float inverse = scale.inverse;
    if (finite) {
        for (int i = 0; i < kScaleGroup; ++i) {
            values[i] = finite_to_fp8(bf16_to_float(row[i]) * inverse);
        }
    } else {
        for (int i = 0; i < kScaleGroup; ++i) {
            values[i] = float_to_fp8(bf16_to_float(row[i]) * inverse);
        }
    }
    return scale.scale;
}

EP_BODY void quantise_body(const uint16_t* __restrict row, int n, uint8_t* __restrict values,
                           float* __restrict scales, bool round_scale) {
    for (int start = 0; start < n; start += kScaleGroup) {
        scales[start / kScaleGroup] = quantise_group(row + start, values + start, round_scale);
    }
}

EP_BODY void multiply_add_body(float weight, const uint16_t* __restrict row, int n,
                               float* __restrict sum) {
    for (int i = 0; i < n; ++i) sum[i] = __builtin_fmaf(weight, bf16_to_float(row[i]), sum[i]);
}

EP_BODY void add_body(const uint16_t* __restrict row, int n, float* __restrict sum) {
    for (int i = 0; i < n; ++i) sum[i] += bf16_to_float(row[i]);
}

// An infinite sum makes NaN of its whole group: no scale reaches it.
EP_BODY void quantise_sum_body(const float* __restrict sum, int n, uint8_t* __restrict values,
                               float* __restrict scales) {
    for (int start = 0; start < n; start += kScaleGroup) {
        uint32_t top = 0;  // magnitudes order as integers do, NaNs above infinity
        float amax = kMinSumAmax;
        for (int i = start; i < start + kScaleGroup; ++i) {
            const uint32_t magnitude = float_to_bits(sum[i]) & 0x7fffffffu;
            top = magnitude > top ? magnitude : top;
            const float a = bits_to_float(magnitude);
            amax = a > amax ? a : amax;  // not for NaN
        }
        const Fp8Scale scale = fp8_scale(amax, false);
        scales[start / kScaleGroup] = scale.scale;
        if (top < 0x7f800000u) {
            for (int i = start; i < start + kScaleGroup; ++i) {
                values[i] = finite_to_fp8(sum[i] * scale.inverse);
            }
        } else {
            for (int i = start; i < start + kScaleGroup; ++i) {
                values[i] = float_to_fp8(sum[i] * scale.inverse);
            }
        }
    }
}

EP_BODY void add_fp8_body(const uint8_t* __restrict values, const float* __restrict scales, int n,
                          float* __restrict sum) {
    for (int start = 0; start < n; start += kScaleGroup) {
        const float scale = scales[start / kScaleGroup];
        for (int i = start; i < start + kScaleGroup; ++i) {
            sum[i] = __builtin_fmaf(scale, fp8_to_float(values[i]), sum[i]);
        }
    }
}

EP_BODY void round_body(const float* __restrict sum, int n, uint16_t* __restrict row) {
    for (int i = 0; i < n; ++i) row[i] = float_to_bf16(sum[i]);
}

#define EP_ROW_MATH(NAME, TARGET)                                                                 \
    TARGET void NAME##_quantise(const uint16_t* row, int n, uint8_t* values, float* scales,       \
                                bool round_scale) {                                               \
        quantise_body(row, n, values, scales, round_scale);                                       \
    }                                                                                             \
    TARGET void NAME##_multiply_add(float weight, const uint16_t* row, int n, float* sum) {       \
        multiply_add_body(weight, row, n, sum);                                                   \
    }                                                                                             \
    TARGET void NAME##_add(const uint16_t* row, int n, float* sum) { add_body(row, n, sum); }     \
    TARGET void NAME##_quantise_sum(const float* sum, int n, uint8_t* values, float* scales) {    \
        quantise_sum_body(sum, n, values, scales);                                                \
    }                                                                                             \
    TARGET void NAME##_add_fp8(const uint8_t* values, const float* scales, int n, float* sum) {   \
        add_fp8_body(values, scales, n, sum);                                                     \
    }                                                                                             \
    TARGET void NAME##_round(const float* sum, int n, uint16_t* row) { round_body(sum, n, row); } \
    constexpr RowMath NAME{NAME##_quantise,     NAME##_multiply_add, NAME##_add,                  \
                           NAME##_quantise_sum, NAME##_add_fp8,      NAME##_round};

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

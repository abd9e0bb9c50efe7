// FP8 e4m3 with one float32 scale per 128 channels, and BF16, the same bits on host and device.
//
// scale = max(amax, 1e-4) / 448; value = round_to_nearest_even(x * (448 / max(amax, 1e-4))).
// Rounded scales are the next power of two that is no smaller; UE8M0 is the exponent byte of one.
#pragma once

#include <cmath>
#include <cstring>

#include "ep/platform.h"

namespace ep {

inline constexpr float kFp8Max = 448.0f;
inline constexpr float kMinAmax = 1e-4f;

EP_HD float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}
EP_HD uint32_t float_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    return u;
}
EP_HD float bf16_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }
EP_HD uint16_t float_to_bf16(float f) {
    const uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);  // NaN
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // nearest, ties to even
}

struct Fp8Scale {
    float scale;
    float inverse;  // what values are multiplied with
};
EP_HD Fp8Scale rounded_scale(float exact) {
    const uint32_t u = float_to_bits(exact);
    const uint32_t exponent = (u >> 23) + ((u & 0x7fffffu) != 0 ? 1u : 0u);  // of a normal number
    const uint32_t inverse = exponent < 254u ? 254u - exponent : 0u;  // infinite rows: NaN values
    return {bits_to_float(exponent << 23), bits_to_float(inverse << 23)};
}
EP_HD Fp8Scale fp8_scale(float amax, bool round_scale) {
    const float exact = amax / kFp8Max;
    return round_scale ? rounded_scale(exact) : Fp8Scale{exact, kFp8Max / amax};
}

// The two quotients without a division, correctly rounded where amax is the magnitude of a BF16 up
// to this one, or kMinAmax: an estimate, corrected by what it leaves. `reciprocal`: 1 / amax, to
// two units in the last place.
inline constexpr float kMostSimpleAmax = 1e37f;
EP_HD float quotient_by_fp8_max(float amax) {
    constexpr float kReciprocal = 1.0f / kFp8Max;
    const float about = amax * kReciprocal;
    return fmaf(fmaf(-about, kFp8Max, amax), kReciprocal, about);
}
EP_HD float fp8_max_quotient(float amax, float reciprocal) {
    const float about = kFp8Max * reciprocal;
    return fmaf(fmaf(-about, amax, kFp8Max), reciprocal, about);
}
EP_HD uint32_t ue8m0(uint32_t scale_bits) { return (scale_bits >> 23) & 0xffu; }

// Of a combine's sums: small enough for every row that matters, large enough that 448 / it is
// finite.
inline constexpr float kMinSumAmax = 1e-30f;

EP_HD float fp8_to_float(uint8_t code) {
    const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
    const uint32_t magnitude = code & 0x7fu;
    if (magnitude == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
    // Exponents of e4m3 are biased by 7, of float32 by 127: 2^120 makes up for it, exactly.
    return bits_to_float(sign | magnitude << 20) * 1.329227995784916e36f;
}

// Saturating, nearest even. Subnormals of e4m3 are multiples of 2^-9.
inline uint8_t float_to_fp8(float f) {
    const uint32_t u = float_to_bits(f);
    const uint8_t sign = static_cast<uint8_t>((u >> 24) & 0x80u);
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7f);
    const float a = bits_to_float(magnitude);
    if (a >= kFp8Max) return static_cast<uint8_t>(sign | 0x7e);
    if (a < 0.015625f) {  // 2^-6, the smallest normal
        const float steps = std::nearbyintf(a * 512.0f);
        return static_cast<uint8_t>(sign | static_cast<uint8_t>(steps));
    }
    const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    const uint32_t code = (rounded >> 20) - ((127u - 7u) << 3);
    return static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}

}  // namespace ep

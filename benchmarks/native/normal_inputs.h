// What the ranks of normal_loop.cu work on: sizes, formats and inputs, the same on every run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ep/fp8.h"

namespace ep {

inline constexpr int kRanks = 2;
inline constexpr int kHidden = 7168;
inline constexpr int kTopk = 8;
inline constexpr int kExperts = 256;
inline constexpr int kLocalExperts = kExperts / kRanks;
inline constexpr int kGroup = 128;  // channels of one FP8 scale

// Rows of one format.
struct Rows {
    const char* name;
    int row_bytes;
    int num_scales;
};
inline constexpr Rows kBf16{"BF16", 2 * kHidden, 0};
inline constexpr Rows kFp8{"FP8", kHidden, kHidden / kGroup};

inline uint64_t mix(uint64_t v) {
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
    return v ^ (v >> 31);
}

// What rows of a combine are like.
enum class Values {
    kUsual,  // nearly normal: sums of four uniform values
    kHard,  // of these, rows in turn: zeros; exponents of all sizes; a channel far above the
            // others; half of the channels zero
};

inline float value_of(Values values, int64_t row, int channel, uint64_t draw) {
    int sum = -131070;
    for (int part = 0; part < 64; part += 16) sum += static_cast<int>(draw >> part & 0xffff);
    const float usual = static_cast<float>(sum) / 65536.0f;
    if (values == Values::kUsual) return usual;
    const uint64_t more = mix(draw);
    switch (row % 8) {
        case 0:
            return 0.0f;
        case 1:
            return std::ldexp(usual, static_cast<int>(more % 120) - 60);
        case 2:
            return channel % 1500 == 7 ? usual * 5000.0f : usual;
        case 3:
            return more % 2 == 0 ? 0.0f : usual;
        default:
            return usual;
    }
}

// A rank's inputs on the host. x serves as BF16 rows, and its first half as FP8 ones.
struct Inputs {
    std::vector<uint8_t> x;
    std::vector<uint32_t> scales;
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;
    std::vector<uint16_t> y;  // what this rank's experts give, row by row

    Inputs(int rank, int num_tokens, Values values) {
        const auto tokens = static_cast<size_t>(num_tokens);
        x.resize(tokens * kBf16.row_bytes);
        auto* words = reinterpret_cast<uint64_t*>(x.data());
        for (size_t i = 0; i < x.size() / 8; ++i) words[i] = mix(i * 2 + rank);
        scales.resize(tokens * kFp8.num_scales);
        for (size_t i = 0; i < scales.size(); ++i) {
            scales[i] = static_cast<uint32_t>(mix(i * 2 + rank + 77));
        }
        for (size_t t = 0; t < tokens; ++t) {
            int64_t chosen[kTopk];
            for (int k = 0; k < kTopk; ++k) {
                uint64_t draw = mix((t * kRanks + rank) * 1000 + k);
                int64_t expert = static_cast<int64_t>(draw % kExperts);
                while (std::find(chosen, chosen + k, expert) != chosen + k) {
                    draw = mix(draw);
                    expert = static_cast<int64_t>(draw % kExperts);
                }
                chosen[k] = expert;
                topk_idx.push_back(expert);
                weights.push_back(static_cast<float>(k + 1) / 16.0f);
            }
        }
        y.resize(tokens * kRanks * kHidden);
        for (size_t i = 0; i < y.size(); ++i) {
            const auto row = static_cast<int64_t>(i / kHidden);
            y[i] = float_to_bf16(
                value_of(values, row, static_cast<int>(i % kHidden), mix(i * 2 + rank + 99)));
        }
    }
    bool goes(int token, int rank) const {
        for (int k = 0; k < kTopk; ++k) {
            if (topk_idx[token * kTopk + k] / kLocalExperts == rank) return true;
        }
        return false;
    }
};

}  // namespace ep

// What a group of ranks must compute, written down plainly: inputs that every rank can make for
// every other one, the arrivals that follow from them, and the sums that must come back.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "ep/fp8.h"
#include "ep/heap.h"

namespace plain {

using ep::Shape;

struct Step {
    int chain;
    uint64_t epoch;
};

inline uint64_t mix(uint64_t h, uint64_t value) {
    h = (h ^ value) * 0x9e3779b97f4a7c15u;
    return h ^ (h >> 29);
}

// What one rank gives to a dispatch. Rows from `valid` on are padding.
struct Input {
    int32_t rows = 0;
    int32_t valid = 0;
    std::vector<uint16_t> x;
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;
};

inline Input make_input(const Shape& s, Step step, int rank) {
    std::mt19937_64 random(mix(mix(mix(7, step.chain), step.epoch), rank));
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    Input input;
    input.rows = below(s.max_tokens + 1);
    input.valid = below(3) == 0 ? below(input.rows + 1) : input.rows;
    for (int64_t i = 0; i < int64_t{input.rows} * s.hidden; ++i) {
        const float value = (below(2001) - 1000) * std::exp2f(static_cast<float>(below(24) - 12));
        input.x.push_back(ep::float_to_bf16(value));
    }
    for (int i = 0; i < input.rows * s.topk; ++i) {
        const bool odd = below(8) == 0;  // none, beyond the last, below -1; repeats come by chance
        const int64_t strange[] = {-1, s.num_experts, -7, int64_t{1} << 40};
        input.topk_idx.push_back(odd ? strange[below(4)] : below(s.num_experts));
        input.weights.push_back(static_cast<float>(below(4000) - 2000) / 1999.0f);
    }
    return input;
}

// The experts a token really goes to, -1 in the place of the others.
inline std::vector<int> kept_experts(const Shape& s, const Input& input, int token) {
    std::vector<int> kept;
    for (int k = 0; k < s.topk; ++k) {
        const int64_t expert = input.topk_idx[token * s.topk + k];
        bool keep = expert >= 0 && expert < s.num_experts;
        for (const int earlier : kept) keep = keep && earlier != expert;
        kept.push_back(keep ? static_cast<int>(expert) : -1);
    }
    return kept;
}

inline int count_dropped(const Shape& s, const Input& input) {
    int dropped = 0;
    for (int token = 0; token < input.valid; ++token) {
        const std::vector<int> kept = kept_experts(s, input, token);
        for (int k = 0; k < s.topk; ++k) {
            dropped += kept[k] < 0 && input.topk_idx[token * s.topk + k] != -1;
        }
    }
    return dropped;
}

struct Arrival {
    int source;
    int token;
    std::vector<int> kept;
};

// Messages for `rank`, in (source, token) order.
inline std::vector<Arrival> arrivals(const Shape& s, const std::vector<Input>& inputs, int rank) {
    std::vector<Arrival> list;
    for (int source = 0; source < s.num_ranks; ++source) {
        for (int token = 0; token < inputs[source].valid; ++token) {
            Arrival a{source, token, kept_experts(s, inputs[source], token)};
            bool here = false;
            for (const int expert : a.kept)
                here = here || (expert >= 0 && s.owner_of(expert) == rank);
            if (here) list.push_back(a);
        }
    }
    return list;
}

// The bytes a row travels as, and its scales.
inline std::vector<uint8_t> wire_row(const Shape& s, const uint16_t* x,
                                     std::vector<float>* scales) {
    scales->clear();
    if (s.wire == ep::Wire::kBf16) {
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(x);
        return std::vector<uint8_t>(bytes, bytes + 2 * s.hidden);
    }
    std::vector<uint8_t> row;
    for (int group = 0; group < s.num_scales(); ++group) {
        float amax = 1e-4f;
        for (int i = 0; i < 128; ++i) {
            amax = std::fmax(amax, std::fabs(ep::bf16_to_float(x[group * 128 + i])));
        }
        const float inverse = 448.0f / amax;
        scales->push_back(amax / 448.0f);
        for (int i = 0; i < 128; ++i) {
            row.push_back(ep::float_to_fp8(ep::bf16_to_float(x[group * 128 + i]) * inverse));
        }
    }
    return row;
}

// What an expert (or, for compact rows, a rank: pass -1 - rank) answers for a token.
inline uint16_t answer(Step step, int source, int token, int expert, int channel) {
    uint64_t h = mix(mix(mix(11, step.chain), step.epoch), source);
    h = mix(mix(mix(h, token), static_cast<uint64_t>(expert)), channel);
    return ep::float_to_bf16(static_cast<float>(static_cast<int>(h % 4001) - 2000) / 1000.0f);
}

// What combine must return for one channel of a token.
inline uint16_t combined(const Shape& s, Step step, bool compact, const Input& input, int source,
                         int token, int channel) {
    const std::vector<int> kept = kept_experts(s, input, token);
    float total = 0.0f;
    for (int rank = 0; rank < s.num_ranks; ++rank) {
        float sum = 0.0f;
        bool here = false;
        for (int k = 0; k < s.topk; ++k) {
            if (kept[k] < 0 || s.owner_of(kept[k]) != rank) continue;
            const uint16_t y = answer(step, source, token, kept[k], channel);
            sum = std::fma(input.weights[token * s.topk + k], ep::bf16_to_float(y), sum);
            here = true;
        }
        if (!here) continue;
        const uint16_t partial =
            compact ? answer(step, source, token, -1 - rank, channel) : ep::float_to_bf16(sum);
        total += ep::bf16_to_float(partial);
    }
    return ep::float_to_bf16(total);
}

}  // namespace plain

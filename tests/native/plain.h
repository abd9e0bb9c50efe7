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

// One dispatch or one combine; number counts those of its kind on the chain, from 1.
struct Step {
    int chain;
    uint64_t number;
};

inline uint64_t mix(uint64_t h, uint64_t value) {
    h = (h ^ value) * 0x9e3779b97f4a7c15u;
    return h ^ (h >> 29);
}

// How all ranks make a dispatch.
struct Call {
    ep::Wire wire;
    bool round_scale;
    bool late;  // weights come with the combines
};

inline Call make_call(const Shape& s, ep::Format format, Step step) {
    std::mt19937_64 random(mix(mix(5, step.chain), step.number));
    const bool may_quantise = s.wire == ep::Wire::kBf16;
    const ep::Wire wire = may_quantise && random() % 2 == 0 ? ep::Wire::kFp8 : s.wire;
    const bool round_scale = random() % 2 == 0;
    return {wire, round_scale, format != ep::Format::kCompact && random() % 2 == 0};
}

// What one rank gives to a dispatch. Rows from `valid` on are padding.
struct Input {
    int32_t rows = 0;
    int32_t valid = 0;
    std::vector<uint8_t> x;
    std::vector<uint32_t> scales;  // of opaque rows, scale by scale: [words][rows]
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;
};

// Bytes of a row as it is given to a dispatch.
inline int64_t given_bytes(const Shape& s) {
    return s.wire == ep::Wire::kOpaque ? s.opaque_row_bytes : 2 * s.hidden;
}

inline std::vector<float> make_weights(const Shape& s, int rows, std::mt19937_64* random) {
    std::vector<float> weights(static_cast<size_t>(rows) * s.topk);
    for (float& w : weights)
        w = static_cast<float>(static_cast<int>((*random)() % 4000) - 2000) / 1999.0f;
    return weights;
}

// The weights that a rank's combine brings.
inline std::vector<float> late_weights(const Shape& s, Step combine, int rank, int rows) {
    std::mt19937_64 random(mix(mix(mix(13, combine.chain), combine.number), rank));
    return make_weights(s, rows, &random);
}

inline Input make_input(const Shape& s, Step step, int rank) {
    std::mt19937_64 random(mix(mix(mix(7, step.chain), step.number), rank));
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    Input input;
    input.rows = below(s.max_tokens + 1);
    input.valid = below(3) == 0 ? below(input.rows + 1) : input.rows;
    std::vector<uint16_t> channels(static_cast<size_t>(input.rows * given_bytes(s) / 2));
    for (uint16_t& channel : channels) {
        const float value = (below(2001) - 1000) * std::exp2f(static_cast<float>(below(24) - 12));
        channel = ep::float_to_bf16(value);
    }
    const auto* bytes = reinterpret_cast<const uint8_t*>(channels.data());
    input.x.assign(bytes, bytes + 2 * channels.size());
    for (int i = 0; i < input.rows * s.opaque_scales; ++i) {
        input.scales.push_back(static_cast<uint32_t>(random()));
    }
    for (int i = 0; i < input.rows * s.topk; ++i) {
        const bool odd = below(8) == 0;  // none, beyond the last, below -1; repeats come by chance
        const int64_t strange[] = {-1, s.num_experts, -7, int64_t{1} << 40};
        input.topk_idx.push_back(odd ? strange[below(4)] : below(s.num_experts));
    }
    input.weights = make_weights(s, input.rows, &random);
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

// A row as it travels, and the words of its scales.
struct Row {
    std::vector<uint8_t> bytes;
    std::vector<uint32_t> scales;
};

inline Row wire_row(const Shape& s, const Call& call, const Input& input, int token) {
    Row row;
    const uint8_t* given = input.x.data() + token * given_bytes(s);
    if (call.wire != ep::Wire::kFp8) {
        row.bytes.assign(given, given + given_bytes(s));
        for (int g = 0; g < s.num_scales(call.wire); ++g) {
            row.scales.push_back(input.scales[g * input.rows + token]);
        }
        return row;
    }
    const auto* x = reinterpret_cast<const uint16_t*>(given);
    for (int first = 0; first < s.hidden; first += 128) {
        float amax = 1e-4f;
        for (int i = 0; i < 128; ++i) {
            amax = std::fmax(amax, std::fabs(ep::bf16_to_float(x[first + i])));
        }
        float scale = amax / 448.0f;
        float inverse = 448.0f / amax;
        if (call.round_scale) {
            int exponent = 0;
            const float mantissa = std::frexp(scale, &exponent);  // in [0.5, 1)
            scale = std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
            inverse = 1.0f / scale;
        }
        row.scales.push_back(ep::float_to_bits(scale));
        for (int i = 0; i < 128; ++i) {
            row.bytes.push_back(ep::float_to_fp8(ep::bf16_to_float(x[first + i]) * inverse));
        }
    }
    return row;
}

// What an expert (or, for compact rows, a rank: pass -1 - rank) answers for a token.
inline uint16_t answer(Step step, int source, int token, int expert, int channel) {
    uint64_t h = mix(mix(mix(11, step.chain), step.number), source);
    h = mix(mix(mix(h, token), static_cast<uint64_t>(expert)), channel);
    return ep::float_to_bf16(static_cast<float>(static_cast<int>(h % 4001) - 2000) / 1000.0f);
}

// What combine must return for one channel of a token. weights: [rows][K], whenever they came.
inline uint16_t combined(const Shape& s, Step step, bool compact, const Input& input,
                         const std::vector<float>& weights, int source, int token, int channel) {
    const std::vector<int> kept = kept_experts(s, input, token);
    float total = 0.0f;
    for (int rank = 0; rank < s.num_ranks; ++rank) {
        float sum = 0.0f;
        bool here = false;
        for (int k = 0; k < s.topk; ++k) {
            if (kept[k] < 0 || s.owner_of(kept[k]) != rank) continue;
            const uint16_t y = answer(step, source, token, kept[k], channel);
            sum = std::fma(weights[token * s.topk + k], ep::bf16_to_float(y), sum);
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

// What the normal operations' steps are run on: sizes, memory of all ranks, inputs and results.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "checks.h"
#include "ep/fp8.h"
#include "ep/normal_tensors.h"

namespace {

using namespace ep;
using normal::BlockLayout;
using normal::BlockSize;
using normal::ControlLayout;
using normal::InboxLayout;
using normal::State;

constexpr int kAlignment = 8;
constexpr int kPadding = 5;  // rows of a block beyond those that come
constexpr uint64_t kBudgetNs = 100'000'000'000ull;

struct Sizes {
    int num_ranks, num_experts, row_bytes, num_scales, topk, max_tokens;

    int hidden() const { return row_bytes / 2; }
    // A dispatch over rails may have an entry for each rank; a combine has a lane for each.
    int combined_topk() const { return std::min(topk, kMaxTopk); }
    int local_experts() const { return num_experts / num_ranks; }
    int64_t most_rows() const { return int64_t{num_ranks} * max_tokens + kPadding; }
    int64_t block_bytes() const {
        return BlockLayout::make(most_rows(), row_bytes, num_scales, topk).bytes;
    }
    int64_t data_bytes() const {
        return normal::kLine + block_bytes() + InboxLayout::make(most_rows(), hidden(), topk).bytes;
    }
};

// The memory of all ranks of one backend.
struct World {
    std::vector<Memory> control, data, locals;
    std::vector<FaultBoard> faults;
    std::vector<uintptr_t> controls, datas;

    explicit World(const Sizes& s) : faults(static_cast<size_t>(s.num_ranks)) {
        for (int r = 0; r < s.num_ranks; ++r) {
            control.push_back(zeroed(ControlLayout::make(s.num_ranks, s.num_experts).bytes));
            data.push_back(zeroed(s.data_bytes()));
            std::memset(data.back().get(), 0xab, static_cast<size_t>(s.data_bytes()));
            locals.push_back(zeroed(sizeof(State)));
            controls.push_back(reinterpret_cast<uintptr_t>(control.back().get()));
            datas.push_back(reinterpret_cast<uintptr_t>(data.back().get()));
            state(r).budget_ns = kBudgetNs;
        }
    }
    State& state(int r) const { return *reinterpret_cast<State*>(locals[r].get()); }
    uintptr_t local_of(int r) const { return reinterpret_cast<uintptr_t>(locals[r].get()); }
    uintptr_t faults_of(int r) { return reinterpret_cast<uintptr_t>(&faults[r]); }
};

// What one rank brings; the row stride is longer than the row, scales lie column by column.
struct Input {
    int num_tokens = 0;
    int64_t stride = 0;
    std::vector<uint8_t> x;
    std::vector<uint32_t> scales;
    std::vector<int64_t> wide;
    std::vector<int32_t> narrow;
    std::vector<float> weights;
    std::vector<uint16_t> bias[2];

    NormalRoutes routes(int topk, bool use_wide, bool with_experts) const {
        const void* idx = use_wide ? static_cast<const void*>(wide.data()) : narrow.data();
        return {with_experts ? idx : nullptr, use_wide ? 8 : 4, weights.data(), topk};
    }
    NormalRows rows(const Sizes& s) const {
        return {x.data(), stride,       s.row_bytes,  scales.data(),
                1,        s.max_tokens, s.num_scales, num_tokens};
    }
};

void draw_bf16(std::mt19937& random, std::vector<uint16_t>& to, int64_t count) {
    std::normal_distribution<float> normal;
    to.resize(static_cast<size_t>(count));
    for (uint16_t& v : to) v = float_to_bf16(normal(random));
}

// Rows in turn: as they are; all zero; every second channel zero; exponents of every size; some
// channels far below the others.
void vary_rows(std::mt19937& random, std::vector<uint16_t>& rows, int64_t stride) {
    for (size_t i = 0; i < rows.size(); ++i) {
        const auto row = static_cast<int64_t>(i) / stride;
        uint16_t& v = rows[i];
        const auto exponent = static_cast<uint16_t>(random() % 200 << 7);
        if (row % 5 == 1 || (row % 5 == 2 && i % 2 == 0)) v = 0;
        if (row % 5 == 3 || (row % 5 == 4 && random() % 180 == 0)) v = (v & 0x807f) | exponent;
    }
}

Input draw(const Sizes& s, std::mt19937& random) {
    Input in;
    in.num_tokens = static_cast<int>(random() % static_cast<unsigned>(s.max_tokens + 1));
    in.stride = s.row_bytes + 32;
    in.x.resize(static_cast<size_t>(in.stride) * s.max_tokens);
    for (uint8_t& v : in.x) v = static_cast<uint8_t>(random());
    in.scales.resize(static_cast<size_t>(s.max_tokens) * s.num_scales + 1);
    for (uint32_t& v : in.scales) v = static_cast<uint32_t>(random());
    std::normal_distribution<float> normal;
    for (int i = 0; i < s.max_tokens * s.topk; ++i) {
        const auto luck = random() % 16;
        const bool lonely = i / s.topk % 7 == 3;  // a token that goes nowhere
        int32_t expert = static_cast<int32_t>(random() % static_cast<unsigned>(s.num_experts));
        if (luck == 0) expert = s.num_experts + 3;
        if (luck == 1) expert = -7;
        if (luck == 2 || lonely) expert = -1;
        in.narrow.push_back(expert);
        in.wide.push_back(expert);
        in.weights.push_back(normal(random));
    }
    for (auto& bias : in.bias) draw_bf16(random, bias, int64_t{s.max_tokens} * s.hidden());
    return in;
}

// What layout and notify write for one rank, poisoned before.
struct Tables {
    std::vector<int32_t> per_rank, per_expert, prefix, position, recv_counts, host_counts;
    std::vector<uint8_t> goes;

    explicit Tables(const Sizes& s)
        : per_rank(s.num_ranks, -7),
          per_expert(s.num_experts, -7),
          prefix(s.num_ranks * s.num_ranks, -7),
          position(s.max_tokens * s.num_ranks, -7),
          recv_counts(s.local_experts(), -7),
          host_counts(s.local_experts() + 4, -7),
          goes(s.max_tokens * s.num_ranks, 0xab) {}
    // In place of layout(): every token goes to all ranks.
    void send_everywhere(int num_tokens) {
        std::fill(per_rank.begin(), per_rank.end(), num_tokens);
        std::fill(per_expert.begin(), per_expert.end(), num_tokens);
        std::fill_n(goes.begin(), static_cast<size_t>(num_tokens) * per_rank.size(), uint8_t{1});
    }
    NormalLayout layout() { return {per_rank.data(), per_expert.data(), goes.data()}; }
    NormalTables tables() { return {prefix.data(), position.data()}; }
    int received(const Sizes& s, int rank) const {
        return prefix[(s.num_ranks - 1) * s.num_ranks + rank];
    }
    bool operator==(const Tables&) const = default;
};

struct Combined {
    std::vector<uint16_t> out;
    std::vector<float> weights;

    explicit Combined(const Sizes& s)
        : out(static_cast<size_t>(s.max_tokens) * s.hidden(), 0xabab),
          weights(static_cast<size_t>(s.max_tokens) * s.topk, -7.0f) {}
    bool operator==(const Combined&) const = default;
};

}  // namespace

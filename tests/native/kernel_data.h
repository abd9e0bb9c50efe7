// What the low-latency steps are run on: memory of all ranks, inputs and results.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "checks.h"
#include "ep/fp8.h"
#include "ep/heap.h"

namespace {

using namespace ep;

constexpr int kMaxTokensHere = 9;
constexpr int kAlignment = 4;

// One backend's memory of all ranks.
struct World {
    std::vector<Memory> heaps, locals;
    std::vector<FaultBoard> faults;
    std::vector<uintptr_t> addresses;

    explicit World(const Shape& s) : faults(static_cast<size_t>(s.num_ranks)) {
        for (int r = 0; r < s.num_ranks; ++r) {
            heaps.push_back(zeroed(HeapLayout::make(s).bytes));
            locals.push_back(zeroed(LocalLayout::make(s).bytes));
            addresses.push_back(reinterpret_cast<uintptr_t>(heaps.back().get()));
        }
    }
};

// The rows and choices of one rank's dispatch. Opaque rows bring their scales column by column.
struct Input {
    int num_tokens = 0;
    int32_t num_valid = 0;
    std::vector<uint8_t> x;
    std::vector<uint32_t> scales;
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;

    SendInput view(const Shape& s, Wire wire, bool round_scale, bool late, const Routing& r) const {
        return {.wire = wire,
                .round_scale = round_scale,
                .x = x.data(),
                .row_stride = s.row_bytes(wire == Wire::kFp8 ? Wire::kBf16 : wire),
                .scales = scales.data(),
                .scale_row_stride = 1,
                .scale_group_stride = kMaxTokensHere,
                .topk_idx = topk_idx.data(),
                .idx_bytes = 8,
                .weights = late ? nullptr : weights.data(),
                .num_tokens = num_tokens,
                .num_valid = &num_valid,
                .routing = r};
    }
};

Input draw(const Shape& s, std::mt19937& random) {
    Input in;
    in.num_tokens = static_cast<int>(random() % (kMaxTokensHere + 1));
    in.num_valid = in.num_tokens - static_cast<int>(random() % 2);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> rows(static_cast<size_t>(kMaxTokensHere) *
                               std::max(s.hidden, s.opaque_row_bytes / 2));
    for (uint16_t& v : rows) v = float_to_bf16(normal(random));
    in.x.resize(2 * rows.size());
    std::memcpy(in.x.data(), rows.data(), in.x.size());
    in.scales.resize(static_cast<size_t>(kMaxTokensHere) * s.opaque_scales + 1);
    for (uint32_t& word : in.scales) word = static_cast<uint32_t>(random());
    in.topk_idx.resize(static_cast<size_t>(kMaxTokensHere) * s.topk);
    in.weights.resize(in.topk_idx.size());
    for (size_t i = 0; i < in.topk_idx.size(); ++i) {
        const auto luck = random() % 16;
        in.topk_idx[i] = luck == 0 ? -1 : luck == 1 ? s.num_experts : random() % s.num_experts;
        in.weights[i] = normal(random);
    }
    return in;
}

// What a dispatch wrote for one rank, poisoned before.
struct Output {
    std::vector<uint8_t> x, routing;
    std::vector<uint32_t> scales;
    std::vector<float> topk_weights;
    std::vector<int32_t> recv_count, expert_offset, topk_idx, num_messages, source_token;
    std::vector<int32_t> cumulative;
    std::vector<int64_t> layout_range, wait_ns;

    explicit Output(const Shape& s)
        : recv_count(s.num_local_experts(), -7),
          expert_offset(s.num_local_experts() + 1, -7),
          num_messages(s.num_ranks, -7),
          cumulative(s.num_local_experts(), 1000),
          layout_range(static_cast<size_t>(s.num_experts), -7),
          wait_ns(s.num_ranks, 5) {
        const size_t rows = rows_of(s);
        x.assign(rows * s.row_bytes(s.wire), 0xab);
        routing.assign(RoutingLayout::make(s).bytes, 0x2b);  // rows that look like rows
        scales.assign(rows * (s.hidden / kScaleGroup + s.opaque_scales), 0xabababab);
        topk_idx.assign(static_cast<size_t>(s.max_messages()) * s.topk, -7);
        topk_weights.assign(topk_idx.size(), -7.0f);
        source_token.assign(rows, -7);
    }
    static size_t rows_of(const Shape& s) {
        return static_cast<size_t>(s.num_local_experts()) * (s.max_messages() + kAlignment);
    }
    Routing route(const Shape& s) { return Routing::at(routing.data(), s); }
    // Scales lie column by column, an expert's columns together.
    RecvTarget target(const Shape& s, Format format, Wire wire, bool ue8m0) {
        const bool batched = format == Format::kBatched;
        const int words =
            ue8m0 ? static_cast<int>(ceil_div(s.num_scales(wire), 4)) : s.num_scales(wire);
        const int rows = batched ? s.max_messages() : static_cast<int>(rows_of(s));
        return {.format = format,
                .wire = wire,
                .alignment = kAlignment,
                .x = x.data(),
                .num_rows = rows * (batched ? s.num_local_experts() : 1),
                .scales = {scales.data(), ue8m0, rows * words, 1, rows},
                .recv_count = recv_count.data(),
                .expert_offset = expert_offset.data(),
                .topk_idx = topk_idx.data(),
                .topk_weights = topk_weights.data(),
                .num_messages = num_messages.data(),
                .source_token = batched ? source_token.data() : nullptr,
                .layout_range = batched ? layout_range.data() : nullptr,
                .cumulative_count = cumulative.data(),
                .wait_ns = wait_ns.data(),
                .routing = route(s)};
    }
    bool same(const Output& o, Format format) const {
        const bool offsets = format != Format::kContiguous || expert_offset == o.expert_offset;
        const bool choices = format != Format::kCompact ||
                             (topk_idx == o.topk_idx && topk_weights == o.topk_weights);
        return x == o.x && scales == o.scales && recv_count == o.recv_count &&
               num_messages == o.num_messages && source_token == o.source_token &&
               layout_range == o.layout_range && cumulative == o.cumulative && offsets && choices;
    }
};

}  // namespace

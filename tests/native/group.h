// Ranks of one process, their memory and their tensors.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "host/host_rank.h"
#include "plain.h"

namespace threads {

using ep::Format;
using ep::Shape;
using plain::Input;

inline constexpr int kRanks = 4;
inline constexpr int kChains = 2;
inline constexpr int kAlignment = 8;
inline constexpr uint8_t kPoison = 0xab;

// The memory of all ranks; ranks are threads.
struct Group {
    Shape shape;
    Format format;
    std::vector<Memory> heaps, locals;
    std::vector<ep::FaultBoard> faults;
    std::vector<std::unique_ptr<ep::host::HostRank>> ranks;
    pthread_barrier_t barrier;

    Group(const Shape& s, Format f) : shape(s), format(f), faults(kRanks) {
        std::vector<uintptr_t> addresses;
        for (int r = 0; r < kRanks; ++r) {
            heaps.push_back(zeroed(ep::HeapLayout::make(s).bytes));
            locals.push_back(zeroed(ep::LocalLayout::make(s).bytes));
            addresses.push_back(reinterpret_cast<uintptr_t>(heaps[r].get()));
        }
        for (int r = 0; r < kRanks; ++r) {
            ranks.push_back(std::make_unique<ep::host::HostRank>(
                s, r, addresses, reinterpret_cast<uintptr_t>(locals[r].get()),
                reinterpret_cast<uintptr_t>(&faults[r])));
            ranks[r]->set_time_budget(60'000'000'000u);
        }
        pthread_barrier_init(&barrier, nullptr, kRanks);
    }
    void meet() { pthread_barrier_wait(&barrier); }
};

// One rank's receive tensors, and the dispatch that used them last.
struct Tensors {
    std::vector<uint8_t> x, routing_bytes;
    std::vector<uint32_t> scales;
    std::vector<float> topk_weights;
    std::vector<int32_t> recv_count, expert_offset, topk_idx, num_messages, source_token,
        cumulative;
    std::vector<int64_t> layout_range, wait_ns;
    std::vector<uint16_t> y, out;
    int64_t rows;
    plain::Call call{};
    std::vector<Input> inputs;            // of every rank
    std::vector<plain::Arrival> arrived;  // at this rank
    std::vector<float> late;              // weights of the combine in flight
    bool valid = false;                   // received: combines may use it

    explicit Tensors(const Shape& s)
        : recv_count(s.num_local_experts()),
          expert_offset(s.num_local_experts() + 1),
          num_messages(s.num_ranks),
          cumulative(s.num_local_experts()),
          layout_range(s.num_experts),
          wait_ns(s.num_ranks),
          rows(int64_t{s.num_local_experts()} * s.max_messages() + 64 * kAlignment) {
        x.resize(rows * s.row_bytes(s.wire));
        routing_bytes.assign(ep::RoutingLayout::make(s).bytes, kPoison);
        scales.resize(rows * (s.hidden / ep::kScaleGroup + s.opaque_scales));
        y.resize(rows * s.hidden);
        topk_idx.resize(int64_t{s.max_messages()} * s.topk);
        topk_weights.resize(topk_idx.size());
        source_token.resize(rows);
        out.resize(int64_t{s.max_tokens} * s.hidden);
    }
    ep::Routing routing(const Shape& s) { return ep::Routing::at(routing_bytes.data(), s); }
    ep::SendInput send(const Shape& s, int rank) {
        const Input& mine = inputs[rank];
        return {.wire = call.wire,
                .round_scale = call.round_scale,
                .x = mine.x.data(),
                .row_stride = plain::given_bytes(s),
                .scales = mine.scales.data(),
                .scale_row_stride = 1,
                .scale_group_stride = mine.rows,
                .topk_idx = mine.topk_idx.data(),
                .idx_bytes = 8,
                .weights = call.late ? nullptr : mine.weights.data(),
                .num_tokens = mine.rows,
                .num_valid = &mine.valid,
                .routing = routing(s)};
    }
    // Scales lie scale by scale (an expert's together), as many words to each as `rows`.
    ep::RecvTarget target(const Shape& s, Format format) {
        const bool batched = format == Format::kBatched;
        const int32_t columns = batched ? s.max_messages() : static_cast<int32_t>(rows);
        return {.format = format,
                .wire = call.wire,
                .alignment = kAlignment,
                .x = x.data(),
                .num_rows = columns * (batched ? s.num_local_experts() : 1),
                .scales = {scales.data(), false, columns * s.num_scales(call.wire), 1, columns},
                .recv_count = recv_count.data(),
                .expert_offset = expert_offset.data(),
                .topk_idx = topk_idx.data(),
                .topk_weights = topk_weights.data(),
                .num_messages = num_messages.data(),
                .source_token = batched ? source_token.data() : nullptr,
                .layout_range = batched ? layout_range.data() : nullptr,
                .cumulative_count = cumulative.data(),
                .wait_ns = wait_ns.data(),
                .routing = routing(s)};
    }
    uint32_t scale(const Shape& s, Format format, int64_t row, int g) const {
        const int64_t columns = format == Format::kBatched ? s.max_messages() : rows;
        const int64_t expert = row / columns;
        return scales[(expert * s.num_scales(call.wire) + g) * columns + row % columns];
    }
};

}  // namespace threads

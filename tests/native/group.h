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

// One rank's tensors for one chain.
struct Tensors {
    std::vector<uint8_t> x;
    std::vector<float> scales, topk_weights;
    std::vector<int32_t> recv_count, expert_offset, topk_idx, num_messages;
    std::vector<uint16_t> y, out;
    std::vector<Input> inputs;  // of every rank
    std::vector<plain::Arrival> arrived;  // at this rank

    explicit Tensors(const Shape& s)
        : recv_count(s.num_local_experts()),
          expert_offset(s.num_local_experts() + 1),
          num_messages(s.num_ranks) {
        const int64_t rows = int64_t{s.num_local_experts()} * s.max_messages() + 64 * kAlignment;
        x.resize(rows * s.row_bytes());
        scales.resize(rows * s.num_scales() + 1);
        y.resize(rows * s.hidden);
        topk_idx.resize(int64_t{s.max_messages()} * s.topk);
        topk_weights.resize(topk_idx.size());
        out.resize(int64_t{s.max_tokens} * s.hidden);
    }
    ep::RecvTarget target(Format format) {
        return {format,          kAlignment,          x.data(),
                scales.data(),   recv_count.data(),   expert_offset.data(),
                topk_idx.data(), topk_weights.data(), num_messages.data()};
    }
};

}  // namespace threads

// A group of emulated ranks beside one of the host backend: rounds of the normal operations on the
// same inputs, which must leave the same bytes.
#pragma once

#include "checks.h"
// The emulator's names must be known before any device code.
#include "emulator/emulator.h"
//
#include "cuda/normal_combine.cuh"
#include "cuda/normal_counts.cuh"
#include "cuda/normal_dispatch.cuh"
#include "host/normal_rank.h"
#include "normal_data.h"

#include <functional>
#include <thread>

namespace {

struct Test {
    Sizes s;
    int grid;
    int combine_as[2];  // rank 0, others
    std::mt19937 random;
    World device{s}, host{s};
    std::vector<normal::Group> groups;
    std::vector<std::unique_ptr<host::NormalRank>> hosts;
    bool everywhere = false;  // tokens go to all ranks, without experts of their choice
    uint64_t dispatched = 0;
    int packed = 0, raw = 0;  // rows of combines that pack

    Test(const Sizes& sizes, int num_ctas, int as_of, int others, unsigned seed)
        : s(sizes), grid(num_ctas), combine_as{as_of, others}, random(seed) {
        for (int r = 0; r < s.num_ranks; ++r) {
            groups.push_back(normal::Group::make(
                s.num_ranks, r, s.num_experts, device.controls.data(), device.datas.data(),
                s.data_bytes(), device.local_of(r), device.faults_of(r)));
            hosts.push_back(std::make_unique<host::NormalRank>(
                s.num_ranks, r, s.num_experts, host.controls, host.datas, s.data_bytes(),
                host.local_of(r), host.faults_of(r)));
        }
    }
    bool chance(unsigned of) { return random() % of == 0; }

    // All ranks at once, a thread each, as an operation waits for the others.
    void on_hosts(const std::function<void(int)>& work) const {
        std::vector<std::thread> threads;
        for (int r = 0; r < s.num_ranks; ++r) threads.emplace_back(work, r);
        for (std::thread& thread : threads) thread.join();
    }
    void on_devices(int num_ranks, const std::function<emulator::Launch(int)>& make) {
        std::vector<emulator::Launch> launches;
        for (int r = 0; r < num_ranks; ++r) launches.push_back(make(r));
        emulator::run(launches, random);
    }

    static FastDiv divisor(int n) { return FastDiv::by(static_cast<uint32_t>(std::max(1, n))); }

    emulator::Launch layout_kernel(int r, const Input& in, bool wide, Tables& to) {
        const normal::LayoutArgs args{
            .routes = in.routes(s.topk, wide, true),
            .num_tokens = in.num_tokens,
            .by_local_experts = FastDiv::by(static_cast<uint32_t>(s.local_experts())),
            .into = to.layout(),
            .group = groups[r]};
        return {grid, normal::kCountThreads,
                normal::layout_scratch_bytes(s.num_ranks, s.num_experts),
                [=](uint8_t* smem) { normal::layout(args, smem); }};
    }
    emulator::Launch notify_kernel(int r, const Input& in, Tables& to) {
        const normal::NotifyArgs args{
            .layout = to.layout(),
            .num_tokens = in.num_tokens,
            .stretch = static_cast<int32_t>(ceil_div(in.num_tokens, grid)),
            .local_experts = s.local_experts(),
            .alignment = kAlignment,
            .tables = to.tables(),
            .recv_counts = to.recv_counts.data(),
            .host_counts = to.host_counts.data(),
            .group = groups[r]};
        return {1 + grid, normal::kCountThreads,
                normal::notify_scratch_bytes(s.num_ranks, s.local_experts()),
                [=](uint8_t* smem) { normal::notify(args, smem); }};
    }
    emulator::Launch dispatch_kernel(int r, const Input& in, const NormalRoutes& routes, Tables& t,
                                     int64_t rows, BlockSize size) {
        const normal::DispatchArgs args{
            .rows = in.rows(s),
            .routes = routes,
            .tables = t.tables(),
            .pieces = normal::Pieces::make(s.row_bytes, normal::kDispatchBytes),
            .scales = normal::ScaleUnits::make(in.rows(s)),
            .by_topk = divisor(routes.topk),
            .local_experts = s.local_experts(),
            .block_offset = normal::kLine,
            .block_rows = rows,
            .size = size,
            .group = groups[r]};
        return {grid, normal::kDispatchThreads, normal::DispatchScratch::bytes(s.num_ranks),
                [=](uint8_t* smem) { normal::dispatch(args, smem); }};
    }
    emulator::Launch combine_kernel(int r, const NormalCombine& work, Tables& t) {
        const auto args =
            normal::CombineArgs::make(work, t.tables(), combine_as[r != 0], groups[r]);
        return {grid, normal::kCombineThreads, normal::CombineScratch::bytes(s.num_ranks),
                [=](uint8_t* smem) { normal::combine(args, smem); }};
    }

    void poison() {
        for (int r = 0; r < s.num_ranks; ++r) {
            std::memset(device.data[r].get(), 0xab, static_cast<size_t>(s.data_bytes()));
            std::memset(host.data[r].get(), 0xab, static_cast<size_t>(s.data_bytes()));
        }
    }

    void compare_blocks() {
        for (int r = 0; r < s.num_ranks; ++r) {
            CHECK(std::memcmp(device.data[r].get(), host.data[r].get(),
                              static_cast<size_t>(normal::kLine + s.block_bytes())) == 0);
        }
    }

    // Rows that follow each other no longer do so at their destination, as where a node passes on
    // what several sources sent.
    void scatter(const std::vector<Input>& inputs, std::vector<Tables>& mine,
                 std::vector<Tables>& right) {
        for (size_t r = 0; r < mine.size(); ++r) {
            int32_t* ours = mine[r].tables().send_position;
            int32_t* theirs = right[r].tables().send_position;
            for (int d = 0; d < s.num_ranks; ++d) {
                std::vector<int32_t> at, positions;
                for (int t = 0; t < inputs[r].num_tokens; ++t) {
                    const int32_t i = t * s.num_ranks + d;
                    if (ours[i] < 0) continue;
                    at.push_back(i);
                    positions.push_back(ours[i]);
                }
                std::shuffle(positions.begin(), positions.end(), random);
                for (size_t j = 0; j < at.size(); ++j) {
                    ours[at[j]] = theirs[at[j]] = positions[j];
                }
            }
        }
    }

    // Where tokens go, as both sides count it.
    void lay_out(const std::vector<Input>& inputs, bool wide, std::vector<Tables>& mine,
                 std::vector<Tables>& right) {
        if (everywhere) {
            for (size_t r = 0; r < inputs.size(); ++r) {
                mine[r].send_everywhere(inputs[r].num_tokens);
                right[r].send_everywhere(inputs[r].num_tokens);
            }
            return;
        }
        on_hosts([&](int r) {
            hosts[r]->layout(inputs[r].routes(s.topk, wide, true), inputs[r].num_tokens,
                             s.num_experts, right[r].layout());
        });
        on_devices(s.num_ranks, [&](int r) { return layout_kernel(r, inputs[r], wide, mine[r]); });
    }

    void round(int number) {
        const auto num_ranks = static_cast<size_t>(s.num_ranks);
        constexpr BlockSize kSizes[] = {BlockSize::kExact, BlockSize::kPadded, BlockSize::kAhead};
        const BlockSize size = kSizes[number % 3];
        const bool wide = chance(2), with_experts = !chance(4);
        std::vector<Input> inputs;
        std::vector<Tables> mine(num_ranks, Tables(s)), right(num_ranks, Tables(s));
        for (size_t r = 0; r < num_ranks; ++r) inputs.push_back(draw(s, random));
        poison();
        lay_out(inputs, wide, mine, right);
        on_hosts([&](int r) {
            hosts[r]->notify(right[r].layout(), inputs[r].num_tokens, s.num_experts, kAlignment,
                             right[r].tables(), right[r].recv_counts.data(),
                             right[r].host_counts.data());
        });
        on_devices(s.num_ranks, [&](int r) { return notify_kernel(r, inputs[r], mine[r]); });
        for (size_t r = 0; r < num_ranks; ++r) CHECK(mine[r] == right[r]);
        if (chance(2)) scatter(inputs, mine, right);

        int most = 0;
        for (int r = 0; r < s.num_ranks; ++r) most = std::max(most, right[r].received(s, r));
        const bool fits = size != BlockSize::kAhead || most == 0 || chance(2);
        const auto rows = [&](int r) -> int64_t {
            if (size == BlockSize::kAhead) return fits ? most + kPadding : most - 1;
            return right[r].received(s, r) + (size == BlockSize::kExact ? 0 : kPadding);
        };
        const auto routes = [&](int r) {
            return everywhere ? NormalRoutes{nullptr, 8, nullptr, 0}
                              : inputs[r].routes(s.topk, wide, with_experts);
        };
        on_hosts([&](int r) {
            hosts[r]->dispatch(inputs[r].rows(s), routes(r), s.num_experts, right[r].tables(),
                               normal::kLine, rows(r), size);
        });
        on_devices(s.num_ranks, [&](int r) {
            return dispatch_kernel(r, inputs[r], routes(r), mine[r], rows(r), size);
        });
        compare_blocks();
        dispatched += fits ? 1 : 0;
        compare_dispatched();
        combine_both_ways(inputs, mine, right);
    }

    void combine_both_ways(const std::vector<Input>& inputs, std::vector<Tables>& mine,
                           std::vector<Tables>& right) {
        const auto num_ranks = static_cast<size_t>(s.num_ranks);
        const bool weighted = chance(2), biased = chance(2), twice = chance(2);
        const int64_t stride = s.hidden() + 16;
        std::vector<std::vector<uint16_t>> y(num_ranks);
        std::vector<std::vector<float>> weights(num_ranks);
        std::vector<Combined> got(num_ranks, Combined(s)), wanted(num_ranks, Combined(s));
        std::normal_distribution<float> normal;
        for (size_t r = 0; r < num_ranks; ++r) {
            draw_bf16(random, y[r], s.most_rows() * stride);
            vary_rows(random, y[r], stride);
            weights[r].resize(static_cast<size_t>(s.most_rows()) * s.topk);
            for (float& w : weights[r]) w = normal(random);
        }
        const auto work = [&](int r, Combined& to) {
            return NormalCombine{reinterpret_cast<const uint8_t*>(y[r].data()),
                                 2 * stride,
                                 s.hidden(),
                                 weighted ? weights[r].data() : nullptr,
                                 s.combined_topk(),
                                 {biased ? inputs[r].bias[0].data() : nullptr,
                                  twice ? inputs[r].bias[1].data() : nullptr},
                                 inputs[r].num_tokens,
                                 normal::kLine + s.block_bytes(),
                                 to.out.data(),
                                 weighted ? to.weights.data() : nullptr};
        };
        on_hosts([&](int r) { hosts[r]->combine(work(r, wanted[r]), right[r].tables()); });
        on_devices(s.num_ranks, [&](int r) { return combine_kernel(r, work(r, got[r]), mine[r]); });
        count_packed(mine[0]);
        for (size_t r = 0; r < num_ranks; ++r) {
            CHECK(got[r] == wanted[r]);
            CHECK(device.faults[r].fatal.code == 0 && host.faults[r].fatal.code == 0);
            CHECK(device.faults[r].routing.count == host.faults[r].routing.count);
        }
    }

    // What ranks' inboxes say of the rows that came home from ranks that pack.
    void count_packed(const Tables& tables) {
        const int32_t* prefix = tables.prefix.data();
        for (int r = 0; r < s.num_ranks; ++r) {
            int rows = 0;
            for (int d = 0; d < s.num_ranks; ++d) {
                if (d != r) rows += normal::tokens_between(prefix, s.num_ranks, r, d);
            }
            const uint8_t* inbox = device.data[r].get() + normal::kLine + s.block_bytes();
            const auto* word = reinterpret_cast<const uint32_t*>(
                inbox + InboxLayout::make(rows, s.hidden(), s.combined_topk()).packed);
            for (int d = 0; d < s.num_ranks; ++d) {
                if (d == r) continue;
                const int count = normal::tokens_between(prefix, s.num_ranks, r, d);
                const bool packs = normal::packs_rows(combine_as[d != 0], s.row_bytes);
                for (int i = 0; packs && i < count; ++i) ++(word[i] == 0 ? raw : packed);
                word += count;
            }
        }
    }

    // (One that found too little room in some block was none.)
    void compare_dispatched() {
        for (int r = 0; r < s.num_ranks; ++r) {
            CHECK(device.state(r).dispatched == dispatched);
            CHECK(hosts[r]->state().dispatched == dispatched);
        }
    }

    void compare_state(uint64_t rounds) {
        for (int r = 0; r < s.num_ranks; ++r) {
            const State& state = device.state(r);
            CHECK(state.notified == rounds && state.combined == rounds);
            for (const uint32_t ticket : state.tickets) CHECK(ticket == 0);
        }
    }
};

}  // namespace

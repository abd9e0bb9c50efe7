// All ranks of a group, emulated beside the host backend on the same inputs.
#pragma once

#include "checks.h"
#include "emulated_kernels.h"
#include "host/host_rank.h"
#include "kernel_data.h"

#include <algorithm>
#include <thread>

namespace {

using namespace ep;

constexpr int kChains = 2;
constexpr int kSteps = 10;  // operations
constexpr uint64_t kBudgetNs = 100'000'000'000ull;

// One dispatch of all ranks, which later combines may go back to.
struct Use {
    bool late = false;
    std::vector<Input> inputs;
    std::vector<Output> mine, right;
};

struct Test {
    Shape shape;
    Format format;
    int grid;
    std::mt19937 random;
    World device{shape}, host{shape};
    uint64_t dispatched[kChains] = {}, combined[kChains] = {};
    std::vector<Context> contexts;
    std::vector<std::unique_ptr<host::HostRank>> hosts;

    Test(const Shape& s, Format f, int num_ctas, unsigned seed)
        : shape(s), format(f), grid(num_ctas), random(seed) {
        for (int r = 0; r < s.num_ranks; ++r) {
            Context ctx{};
            ctx.set_shape(s);
            ctx.rank = r;
            ctx.local = device.locals[r].get();
            ctx.faults = &device.faults[r];
            for (int p = 0; p < s.num_ranks; ++p) ctx.heap[p] = device.heaps[p].get();
            std::memcpy(ctx.local + LocalLayout::kBudgetOffset, &kBudgetNs, sizeof(kBudgetNs));
            contexts.push_back(ctx);
            hosts.push_back(std::make_unique<host::HostRank>(
                s, r, host.addresses, reinterpret_cast<uintptr_t>(host.locals[r].get()),
                reinterpret_cast<uintptr_t>(&host.faults[r])));
        }
    }

    // A rank's kernels, of one kind or another.
    Emulated emulated(const Context& ctx, int chain, Wire wire) {
        const View view = View::make(ctx, chain, wire);
        return {view,
                grid,
                chance(2),
                senders(),
                chance(2),
                chance(2),
                part_bits(view, 1, 1 + random() % 4)};
    }

    // Every rank's launch, all at once.
    template <class Make>
    void on_all(int chain, Wire wire, Make make) {
        std::vector<Emulated> ranks;
        for (const Context& ctx : contexts) ranks.push_back(emulated(ctx, chain, wire));
        std::vector<emulator::Launch> launches;
        for (size_t r = 0; r < ranks.size(); ++r) launches.push_back(make(ranks[r], r));
        emulator::run(launches, random);
    }

    bool chance(unsigned of) { return random() % of == 0; }
    // At least one CTA is left to receive.
    int senders() { return static_cast<int>(random() % static_cast<unsigned>(grid - 1)); }

    // On every rank, the masked ones included: those go on calling, to no effect.
    void change_mask() {
        const int peer = static_cast<int>(random() % static_cast<unsigned>(shape.num_ranks));
        const bool masked = chance(3);
        for (int r = 0; r < shape.num_ranks; ++r) {
            hosts[r]->set_rank_mask(peer, masked);
            *contexts[r].mask() = hosts[r]->read_rank_mask();
        }
    }

    std::unique_ptr<Use> dispatch(int chain, bool fused) {
        const auto num_ranks = static_cast<size_t>(shape.num_ranks);
        auto use = std::make_unique<Use>();
        use->late = format != Format::kCompact && chance(2);
        use->mine.assign(num_ranks, Output(shape));
        use->right.assign(num_ranks, Output(shape));
        for (size_t r = 0; r < num_ranks; ++r) use->inputs.push_back(draw(shape, random));
        const Wire wire = shape.wire == Wire::kBf16 && chance(2) ? Wire::kFp8 : shape.wire;
        const bool ue8m0 = wire == Wire::kFp8 && chance(2);
        const bool round_scale = ue8m0 || chance(2);

        const auto in = [&](size_t r, std::vector<Output>& outputs) {
            return use->inputs[r].view(shape, wire, round_scale, use->late,
                                       outputs[r].route(shape));
        };
        const auto to = [&](size_t r, std::vector<Output>& outputs) {
            return outputs[r].target(shape, format, wire, ue8m0);
        };
        for (size_t r = 0; r < num_ranks; ++r) hosts[r]->dispatch_send(chain, in(r, use->right));
        for (size_t r = 0; r < num_ranks; ++r) hosts[r]->dispatch_recv(chain, to(r, use->right));
        if (fused) {
            on_all(chain, wire, [&](const Emulated& e, size_t r) {
                return e.dispatch_fused_kernel(in(r, use->mine), to(r, use->mine));
            });
        } else {
            on_all(chain, wire, [&](const Emulated& e, size_t r) {
                return e.dispatch_send_kernel(in(r, use->mine));
            });
            on_all(chain, wire, [&](const Emulated& e, size_t r) {
                return e.dispatch_recv_kernel(to(r, use->mine));
            });
        }
        for (size_t r = 0; r < num_ranks; ++r) {
            CHECK(use->mine[r].same(use->right[r], format));
            for (const int64_t ns : use->mine[r].wait_ns) CHECK(ns >= 5);
        }
        ++dispatched[chain];
        return use;
    }

    void combine(int chain, bool fused, Use& use) {
        const auto num_ranks = static_cast<size_t>(shape.num_ranks);
        const Wire wire = shape.combine == Wire::kBf16 && chance(2) ? Wire::kFp8 : shape.combine;
        std::normal_distribution<float> normal;
        std::vector<std::vector<uint16_t>> y(num_ranks), mine(num_ranks), right(num_ranks);
        std::vector<Input> tables(use.inputs);  // with other weights every time
        for (size_t r = 0; r < num_ranks; ++r) {
            y[r].resize(Output::rows_of(shape) * shape.hidden);
            for (uint16_t& v : y[r]) v = float_to_bf16(normal(random));
            mine[r].assign(static_cast<size_t>(kMaxTokensHere) * shape.hidden, 0xabab);
            right[r] = mine[r];
            for (float& w : tables[r].weights) w = normal(random);
        }
        const auto from = [&](size_t r, std::vector<Output>& outputs) {
            return CombineInput{.wire = wire,
                                .y = y[r].data(),
                                .row_stride = shape.hidden,
                                .late_weights = use.late,
                                .weights = tables[r].weights.data(),
                                .num_tokens = use.inputs[r].num_tokens,
                                .routing = outputs[r].route(shape)};
        };
        const auto out = [&](size_t r, std::vector<uint16_t>& rows, std::vector<Output>& outputs) {
            return CombineOutput{.wire = wire,
                                 .late_weights = use.late,
                                 .out = rows.data(),
                                 .num_tokens = use.inputs[r].num_tokens,
                                 .num_valid = &use.inputs[r].num_valid,
                                 .wait_ns = outputs[r].wait_ns.data(),
                                 .routing = outputs[r].route(shape)};
        };
        {
            std::vector<std::thread> threads;  // late weights: their sends wait for each other
            for (size_t r = 0; r < num_ranks; ++r) {
                threads.emplace_back([&, r] {
                    hosts[r]->combine_send(chain, from(r, use.right));
                    hosts[r]->combine_recv(chain, out(r, right[r], use.right));
                });
            }
            for (std::thread& thread : threads) thread.join();
        }
        if (fused) {
            on_all(chain, shape.wire, [&](const Emulated& e, size_t r) {
                return e.combine_fused_kernel(from(r, use.mine), out(r, mine[r], use.mine));
            });
        } else {
            on_all(chain, shape.wire, [&](const Emulated& e, size_t r) {
                return e.combine_send_kernel(from(r, use.mine));
            });
            on_all(chain, shape.wire, [&](const Emulated& e, size_t r) {
                return e.combine_recv_kernel(out(r, mine[r], use.mine));
            });
        }
        for (size_t r = 0; r < num_ranks; ++r) {
            CHECK(mine[r] == right[r]);
            CHECK(device.faults[r].fatal.code == 0 && host.faults[r].fatal.code == 0);
            CHECK(device.faults[r].routing.count == host.faults[r].routing.count);
        }
        ++combined[chain];
    }

    // Dispatches and combines of one chain in any order; a combine may go back to any dispatch.
    void run() {
        std::vector<std::unique_ptr<Use>> uses[kChains];
        for (int i = 0; i < kSteps; ++i) {
            const int chain = static_cast<int>(random() % kChains);
            if (chance(4)) change_mask();
            auto& known = uses[chain];
            if (known.empty() || chance(2)) {
                known.push_back(dispatch(chain, chance(2)));
            } else {
                combine(chain, chance(2), *known[random() % known.size()]);
            }
        }
    }

    void compare_state() const {
        for (int r = 0; r < shape.num_ranks; ++r) {
            for (int c = 0; c < kChains; ++c) {
                const ChainState& state = *contexts[r].state(c);
                CHECK(state.dispatched == dispatched[c] && state.combined == combined[c]);
                CHECK(state.dispatch_readers == 0 && state.combine_readers == 0);
                const StepStats& stats = *contexts[r].stats(c);
                const StepStats expected = hosts[r]->read_stats(c);
                CHECK(stats.messages_sent == expected.messages_sent);
                CHECK(stats.messages_received == expected.messages_received);
                CHECK(stats.rows_received == expected.rows_received);
                CHECK(stats.bytes_dispatched == expected.bytes_dispatched);
                CHECK(stats.bytes_combined == expected.bytes_combined);
            }
        }
    }
};

}  // namespace

// The CUDA steps, emulated, beside the host backend: the same inputs must give the same bytes.
//
//   kernel_steps FORMAT WIRE RANKS HIDDEN TOPK CTAS SEED        (0 batched, 1 contiguous, 2
//   compact; 0 BF16, 1 FP8, 2 opaque)
//
// Dispatches and combines on two chains in any order, fused and split, with other numbers of tokens
// on every rank and entries that are missing, out of range or repeated. Ranks are masked and
// unmasked on the way; combines travel as BF16 or FP8.
#include "checks.h"
#include "emulated_kernels.h"
#include "host/host_rank.h"
#include "kernel_data.h"

#include <algorithm>
#include <chrono>
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

// The last rank comes late to a dispatch and its combine, by several times as long as either takes:
// the time is put down to it alone.
void check_late_rank(const Shape& shape, Format format, int grid) {
    using Clock = std::chrono::steady_clock;
    constexpr auto kLeast = std::chrono::milliseconds(100);  // whatever else this machine does
    Test test(shape, format, grid, 2);
    const auto slow = static_cast<size_t>(shape.num_ranks - 1);
    std::vector<Input> inputs;
    std::vector<Output> outputs(slow + 1, Output(shape));
    for (size_t r = 0; r <= slow; ++r) inputs.push_back(draw(shape, test.random));
    const std::vector<uint16_t> y(Output::rows_of(shape) * shape.hidden);
    std::vector<uint16_t> home(static_cast<size_t>(kMaxTokensHere) * shape.hidden);

    const auto late_until = [](const emulator::Launch& launch, Clock::time_point start) {
        emulator::Launch later = launch;
        later.body = [=](uint8_t* smem) {
            while (Clock::now() < start) emulator::pause();
            launch.body(smem);
        };
        return later;
    };
    const auto check = [&](auto make) {
        Clock::duration late{};
        for (const bool is_late : {false, true}) {
            for (Output& output : outputs) std::ranges::fill(output.wait_ns, 0);
            const auto begin = Clock::now();
            test.on_all(0, shape.wire, [&](const Emulated& e, size_t r) {
                return is_late && r == slow ? late_until(make(e, r), begin + late) : make(e, r);
            });
            if (!is_late) late = std::max<Clock::duration>(5 * (Clock::now() - begin), kLeast);
        }
        const auto half = std::chrono::nanoseconds(late).count() / 2;
        for (size_t r = 0; r < slow; ++r) {
            for (size_t peer = 0; peer < slow; ++peer) CHECK(outputs[r].wait_ns[peer] < half);
            CHECK(outputs[r].wait_ns[slow] > half);
        }
    };
    check([&](const Emulated& e, size_t r) {
        return e.dispatch_fused_kernel(
            inputs[r].view(shape, shape.wire, false, false, outputs[r].route(shape)),
            outputs[r].target(shape, format, shape.wire, false));
    });
    check([&](const Emulated& e, size_t r) {
        const Routing routing = outputs[r].route(shape);
        return e.combine_fused_kernel({.wire = shape.combine,
                                       .y = y.data(),
                                       .row_stride = shape.hidden,
                                       .late_weights = false,
                                       .weights = nullptr,
                                       .num_tokens = inputs[r].num_tokens,
                                       .routing = routing},
                                      {.wire = shape.combine,
                                       .out = home.data(),
                                       .num_tokens = inputs[r].num_tokens,
                                       .num_valid = &inputs[r].num_valid,
                                       .wait_ns = outputs[r].wait_ns.data(),
                                       .routing = routing});
    });
}

// A rank that the others mask, and that does not know: what it sends lies in their inboxes, under
// the epoch that they wait for, and is nothing to them.
void check_unaware_rank(const Shape& shape, Format format, int grid, unsigned seed) {
    Test test(shape, format, grid, seed);
    const auto num_ranks = static_cast<size_t>(shape.num_ranks);
    std::vector<Input> inputs;
    std::vector<Output> mine(num_ranks, Output(shape)), right(num_ranks, Output(shape));
    std::vector<Emulated> ranks;
    for (size_t r = 0; r < num_ranks; ++r) {
        if (r > 0) {
            test.hosts[r]->set_rank_mask(0, true);
            *test.contexts[r].mask() = test.hosts[r]->read_rank_mask();
        }
        inputs.push_back(draw(shape, test.random));
        ranks.push_back(test.emulated(test.contexts[r], 0, shape.wire));
    }
    const auto in = [&](size_t r, std::vector<Output>& outputs) {
        return inputs[r].view(shape, shape.wire, false, false, outputs[r].route(shape));
    };
    for (size_t r = 0; r < num_ranks; ++r) test.hosts[r]->dispatch_send(0, in(r, right));
    emulator::run({ranks[0].dispatch_send_kernel(in(0, mine))}, test.random);
    std::vector<emulator::Launch> launches;
    for (size_t r = 1; r < num_ranks; ++r) {
        test.hosts[r]->dispatch_recv(0, right[r].target(shape, format, shape.wire, false));
        launches.push_back(ranks[r].dispatch_fused_kernel(
            in(r, mine), mine[r].target(shape, format, shape.wire, false)));
    }
    emulator::run(launches, test.random);
    for (size_t r = 1; r < num_ranks; ++r) {
        CHECK(test.device.faults[r].fatal.code == 0 && test.host.faults[r].fatal.code == 0);
        CHECK(mine[r].same(right[r], format));
    }
}

// A rank that never comes: the others name it, tell each other, and end; so does what follows.
void check_absent_rank(const Shape& shape, Format format, int grid) {
    Test test(shape, format, grid, 1);
    const auto absent = static_cast<size_t>(shape.num_ranks - 1);
    const uint64_t budget_ns = 50'000'000;
    for (const Context& ctx : test.contexts) {
        std::memcpy(ctx.local + LocalLayout::kBudgetOffset, &budget_ns, sizeof(budget_ns));
    }
    const Input input = draw(shape, test.random);
    std::vector<Output> outputs(absent + 1, Output(shape));
    std::vector<Emulated> ranks;
    for (const Context& ctx : test.contexts) ranks.push_back(test.emulated(ctx, 0, shape.wire));
    const auto sent = [&](size_t r) {
        return input.view(shape, shape.wire, false, false, outputs[r].route(shape));
    };
    std::vector<emulator::Launch> launches;
    for (size_t r = 0; r < absent; ++r) {
        launches.push_back(ranks[r].dispatch_fused_kernel(
            sent(r), outputs[r].target(shape, format, shape.wire, false)));
    }
    emulator::run(launches, test.random);
    int first = 0;
    for (size_t r = 0; r < absent; ++r) {
        const Fault& fault = test.device.faults[r].fatal;
        const auto code = static_cast<FaultCode>(fault.code);
        CHECK(code == FaultCode::kTimeout || code == FaultCode::kAborted);
        CHECK(fault.peer == static_cast<int>(absent));
        first += code == FaultCode::kTimeout;
    }
    CHECK(first >= 1);

    // Combines of what nobody received: the memory for it holds rows that are none (Output).
    const std::vector<uint16_t> y(Output::rows_of(shape) * shape.hidden);
    const std::vector<uint16_t> untouched(static_cast<size_t>(kMaxTokensHere) * shape.hidden);
    std::vector<uint16_t> home = untouched;
    const Routing unknown = outputs[0].route(shape);
    std::memset(unknown.received, 0x2b, sizeof(int32_t) * (absent + 1));
    std::memset(unknown.refs, 0x2b, sizeof(RowRef) * shape.max_messages() * shape.topk);
    const CombineInput in{.wire = shape.combine,
                          .y = y.data(),
                          .row_stride = shape.hidden,
                          .late_weights = false,
                          .weights = nullptr,
                          .num_tokens = input.num_tokens,
                          .routing = unknown};
    const CombineOutput out{.wire = shape.combine,
                            .out = home.data(),
                            .num_tokens = input.num_tokens,
                            .num_valid = &input.num_valid,
                            .wait_ns = nullptr,
                            .routing = unknown};
    emulator::run({ranks[0].combine_send_kernel(in)}, test.random);
    emulator::run({ranks[0].combine_recv_kernel(out)}, test.random);
    emulator::run({ranks[0].combine_fused_kernel(in, out)}, test.random);
    CHECK(home == untouched);

    emulator::run({ranks[absent].dispatch_send_kernel(sent(absent))}, test.random);
    const Fault& told = test.device.faults[absent].fatal;
    CHECK(static_cast<FaultCode>(told.code) == FaultCode::kAborted);
    CHECK(told.peer == static_cast<int>(absent));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 8);
    const auto argument = [&](int i) { return std::atoi(argv[i]); };
    const int num_ranks = argument(3);
    const auto wire = static_cast<Wire>(argument(2));
    const bool opaque = wire == Wire::kOpaque;
    const Shape shape{.num_ranks = num_ranks,
                      .num_experts = 5 * num_ranks,
                      .topk = argument(5),
                      .hidden = argument(4),
                      .max_tokens = kMaxTokensHere,
                      .num_chains = kChains,
                      .wire = wire,
                      .opaque_row_bytes = opaque ? argument(4) / 2 + 16 : 0,
                      .opaque_scales = opaque ? 13 : 0,
                      .combine = argument(7) % 2 == 0 ? Wire::kBf16 : Wire::kFp8};
    CHECK(invalid_reason(shape) == nullptr);
    const auto format = static_cast<Format>(argument(1));
    const int grid = argument(6);
    Test test(shape, format, grid, static_cast<unsigned>(argument(7)));
    test.run();
    test.compare_state();
    const bool quick = num_ranks <= 3 && shape.hidden <= 384;
    if (num_ranks > 1 && quick) check_late_rank(shape, format, grid);
    if (num_ranks > 1) check_absent_rank(shape, format, grid);
    if (num_ranks > 1) {
        for (unsigned seed = 1; seed <= 2; ++seed) check_unaware_rank(shape, format, grid, seed);
    }
    std::puts("the kernels' steps and the host backend agree");
}

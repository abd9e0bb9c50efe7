// The CUDA steps, emulated, beside the host backend: the same inputs must give the same bytes.
//
//   kernel_steps FORMAT WIRE RANKS HIDDEN TOPK CTAS SEED        (0 batched, 1 contiguous, 2
//   compact; 0 BF16, 1 FP8)
//
// Several steps on two chains, fused and split in turn, with other numbers of tokens on every rank
// and entries that are missing, out of range or repeated.
#include "checks.h"
#include "emulated_kernels.h"
#include "host/host_rank.h"

namespace {

using namespace ep;

constexpr int kChains = 2;
constexpr int kSteps = 6;
constexpr int kMaxTokensHere = 5;
constexpr int kAlignment = 4;
constexpr uint64_t kBudgetNs = 100'000'000'000ull;

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

struct Input {
    int num_tokens = 0;
    std::vector<uint16_t> x;
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;
    int32_t num_valid = 0;

    SendInput view(const Shape& s) const {
        return {x.data(), s.hidden, topk_idx.data(), 8, weights.data(), num_tokens, &num_valid};
    }
};

Input draw(const Shape& s, std::mt19937& random) {
    Input in;
    in.num_tokens = static_cast<int>(random() % (kMaxTokensHere + 1));
    in.num_valid = in.num_tokens - static_cast<int>(random() % 2);
    std::normal_distribution<float> normal;
    in.x.resize(static_cast<size_t>(kMaxTokensHere) * s.hidden);
    for (uint16_t& v : in.x) v = float_to_bf16(normal(random));
    in.topk_idx.resize(static_cast<size_t>(kMaxTokensHere) * s.topk);
    in.weights.resize(in.topk_idx.size());
    for (size_t i = 0; i < in.topk_idx.size(); ++i) {
        const auto luck = random() % 16;
        in.topk_idx[i] = luck == 0 ? -1 : luck == 1 ? s.num_experts : random() % s.num_experts;
        in.weights[i] = normal(random);
    }
    return in;
}

// What a dispatch and a combine wrote for one rank, poisoned before.
struct Output {
    std::vector<uint8_t> x;
    std::vector<float> scales, topk_weights;
    std::vector<int32_t> recv_count, expert_offset, topk_idx, num_messages;
    std::vector<uint16_t> out;

    explicit Output(const Shape& s)
        : recv_count(s.num_local_experts(), -7),
          expert_offset(s.num_local_experts() + 1, -7),
          num_messages(s.num_ranks, -7) {
        const size_t rows = rows_of(s);
        x.assign(rows * s.row_bytes(), 0xab);
        scales.assign(rows * s.num_scales() + 1, -7.0f);
        topk_idx.assign(static_cast<size_t>(s.max_messages()) * s.topk, -7);
        topk_weights.assign(topk_idx.size(), -7.0f);
        out.assign(static_cast<size_t>(kMaxTokensHere) * s.hidden, 0xabab);
    }
    static size_t rows_of(const Shape& s) {
        return static_cast<size_t>(s.num_local_experts()) * (s.max_messages() + kAlignment);
    }
    RecvTarget target(Format format) {
        return {format,          kAlignment,          x.data(),
                scales.data(),   recv_count.data(),   expert_offset.data(),
                topk_idx.data(), topk_weights.data(), num_messages.data()};
    }
    bool same_dispatch(const Output& o, Format format) const {
        const bool offsets = format != Format::kContiguous || expert_offset == o.expert_offset;
        const bool choices = format != Format::kCompact ||
                             (topk_idx == o.topk_idx && topk_weights == o.topk_weights);
        return x == o.x && scales == o.scales && recv_count == o.recv_count &&
               num_messages == o.num_messages && offsets && choices;
    }
};

struct Test {
    Shape shape;
    Format format;
    int grid;
    std::mt19937 random;
    World device{shape}, host{shape};
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

    // Every rank's launch, all at once.
    template <class Make>
    void on_all(int chain, Make make) {
        std::vector<Emulated> ranks;
        for (const Context& ctx : contexts) ranks.push_back({View::make(ctx, chain), grid});
        std::vector<emulator::Launch> launches;
        for (size_t r = 0; r < ranks.size(); ++r) launches.push_back(make(ranks[r], r));
        emulator::run(launches, random);
    }

    void step(int chain, bool fused) {
        const auto num_ranks = static_cast<size_t>(shape.num_ranks);
        std::vector<Input> inputs;
        std::vector<Output> mine(num_ranks, Output(shape)), right(num_ranks, Output(shape));
        for (size_t r = 0; r < num_ranks; ++r) inputs.push_back(draw(shape, random));

        for (size_t r = 0; r < num_ranks; ++r)
            hosts[r]->dispatch_send(chain, inputs[r].view(shape));
        for (size_t r = 0; r < num_ranks; ++r)
            hosts[r]->dispatch_recv(chain, right[r].target(format));
        const auto in = [&](size_t r) { return inputs[r].view(shape); };
        const auto to = [&](size_t r) { return mine[r].target(format); };
        if (fused) {
            on_all(chain, [&](const Emulated& e, size_t r) {
                return e.dispatch_fused_kernel(in(r), to(r));
            });
        } else {
            on_all(chain,
                   [&](const Emulated& e, size_t r) { return e.dispatch_send_kernel(in(r)); });
            on_all(chain,
                   [&](const Emulated& e, size_t r) { return e.dispatch_recv_kernel(to(r)); });
        }
        for (size_t r = 0; r < num_ranks; ++r) CHECK(mine[r].same_dispatch(right[r], format));

        std::normal_distribution<float> normal;
        std::vector<std::vector<uint16_t>> y(num_ranks);
        for (auto& rows : y) {
            rows.resize(Output::rows_of(shape) * shape.hidden);
            for (uint16_t& v : rows) v = float_to_bf16(normal(random));
        }
        for (size_t r = 0; r < num_ranks; ++r)
            hosts[r]->combine_send(chain, y[r].data(), shape.hidden);
        for (size_t r = 0; r < num_ranks; ++r) {
            hosts[r]->combine_recv(chain, right[r].out.data(), inputs[r].num_tokens,
                                   &inputs[r].num_valid);
        }
        const auto from = [&](size_t r) { return CombineInput{y[r].data(), shape.hidden}; };
        const auto out = [&](size_t r) {
            return CombineOutput{mine[r].out.data(), inputs[r].num_tokens, &inputs[r].num_valid};
        };
        if (fused) {
            on_all(chain, [&](const Emulated& e, size_t r) {
                return e.combine_fused_kernel(from(r), out(r));
            });
        } else {
            on_all(chain,
                   [&](const Emulated& e, size_t r) { return e.combine_send_kernel(from(r)); });
            on_all(chain,
                   [&](const Emulated& e, size_t r) { return e.combine_recv_kernel(out(r)); });
        }
        for (size_t r = 0; r < num_ranks; ++r) {
            CHECK(mine[r].out == right[r].out);
            CHECK(device.faults[r].fatal.code == 0 && host.faults[r].fatal.code == 0);
            CHECK(device.faults[r].routing.count == host.faults[r].routing.count);
        }
    }

    void compare_state() const {
        for (int r = 0; r < shape.num_ranks; ++r) {
            for (int c = 0; c < kChains; ++c) {
                const ChainState& state = *contexts[r].state(c);
                CHECK(state.dispatched == kSteps / kChains && state.combined == state.dispatched);
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
    for (const Context& ctx : test.contexts) ranks.push_back({View::make(ctx, 0), test.grid});
    std::vector<emulator::Launch> launches;
    for (size_t r = 0; r < absent; ++r) {
        launches.push_back(
            ranks[r].dispatch_fused_kernel(input.view(shape), outputs[r].target(format)));
    }
    emulator::run(launches, test.random);
    int first = 0;
    for (size_t r = 0; r < absent; ++r) {
        const Fault& fault = test.device.faults[r].fatal;
        const auto code = static_cast<FaultCode>(fault.code);
        CHECK(code == FaultCode::kTimeout || code == FaultCode::kAborted);
        CHECK(fault.peer == static_cast<int>(absent));
        first += code == FaultCode::kTimeout;
        CHECK(test.contexts[r].state(0)->dispatched == 0);
    }
    CHECK(first >= 1);

    emulator::run({ranks[absent].dispatch_send_kernel(input.view(shape))}, test.random);
    const Fault& told = test.device.faults[absent].fatal;
    CHECK(static_cast<FaultCode>(told.code) == FaultCode::kAborted);
    CHECK(told.peer == static_cast<int>(absent));
}

// Twice the same half: recorded, and nobody hangs.
void check_order(const Shape& shape, Format format, int grid) {
    Test test(shape, format, grid, 2);
    test.step(0, true);
    const std::vector<uint16_t> y(Output::rows_of(shape) * shape.hidden);
    test.on_all(0, [&](const Emulated& e, size_t) {
        return e.combine_fused_kernel({y.data(), shape.hidden}, {});
    });
    for (const FaultBoard& board : test.device.faults) {
        const auto code = static_cast<FaultCode>(board.fatal.code);
        CHECK(code == FaultCode::kSequence || code == FaultCode::kAborted);
        CHECK(static_cast<Op>(board.fatal.op) == Op::kCombine);
    }
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 8);
    const auto argument = [&](int i) { return std::atoi(argv[i]); };
    const int num_ranks = argument(3);
    const Shape shape{.num_ranks = num_ranks,
                      .num_experts = 5 * num_ranks,
                      .topk = argument(5),
                      .hidden = argument(4),
                      .max_tokens = kMaxTokensHere,
                      .num_chains = kChains,
                      .wire = static_cast<Wire>(argument(2))};
    CHECK(invalid_reason(shape) == nullptr);
    const auto format = static_cast<Format>(argument(1));
    const int grid = argument(6);
    Test test(shape, format, grid, static_cast<unsigned>(argument(7)));
    for (int i = 0; i < kSteps; ++i) test.step(i % kChains, i % 4 < 2);
    test.compare_state();
    if (num_ranks > 1) check_absent_rank(shape, format, grid);
    check_order(shape, format, grid);
    std::puts("the kernels' steps and the host backend agree");
}

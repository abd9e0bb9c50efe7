// The CUDA steps of the normal operations, emulated, beside the host backend: same inputs, same
// bytes.
//
//   normal_steps RANKS EXPERTS ROW_BYTES SCALES TOPK TOKENS CTAS SEED
//
// Rounds of layout, notify, dispatch and combine with other tokens on every rank, entries that are
// missing, out of range or repeated, and a rank that never comes at the end.
#include "checks.h"
// The emulator's names must be known before any device code.
#include "emulator/emulator.h"
//
#include "cuda/normal_combine.cuh"
#include "cuda/normal_counts.cuh"
#include "cuda/normal_dispatch.cuh"
#include "host/normal_rank.h"

#include <functional>
#include <thread>

namespace {

using namespace ep;
using normal::BlockLayout;
using normal::ControlLayout;
using normal::InboxLayout;
using normal::State;

constexpr int kRoundsHere = 3;
constexpr int kAlignment = 8;
constexpr int kPadding = 5;  // rows of a block beyond those that come
constexpr uint64_t kBudgetNs = 100'000'000'000ull;

struct Sizes {
    int num_ranks, num_experts, row_bytes, num_scales, topk, max_tokens;

    int hidden() const { return row_bytes / 2; }
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

struct Test {
    Sizes s;
    int grid;
    std::mt19937 random;
    World device{s}, host{s};
    std::vector<normal::Group> groups;
    std::vector<std::unique_ptr<host::NormalRank>> hosts;

    Test(const Sizes& sizes, int num_ctas, unsigned seed) : s(sizes), grid(num_ctas), random(seed) {
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

    emulator::Launch layout_kernel(int r, const Input& in, bool wide, Tables& to) {
        std::fill(to.per_rank.begin(), to.per_rank.end(), 0);  // the launcher's memsets
        std::fill(to.per_expert.begin(), to.per_expert.end(), 0);
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
                                     int64_t rows, bool exact) {
        const normal::DispatchArgs args{.rows = in.rows(s),
                                        .routes = routes,
                                        .tables = t.tables(),
                                        .pieces = normal::Pieces::make(s.row_bytes),
                                        .local_experts = s.local_experts(),
                                        .block_offset = normal::kLine,
                                        .block_rows = rows,
                                        .exact = exact,
                                        .group = groups[r]};
        return {grid, 32 * normal::kDispatchWarps, normal::DispatchScratch::bytes(s.num_ranks),
                [=](uint8_t* smem) { normal::dispatch(args, smem); }};
    }
    emulator::Launch combine_kernel(int r, const NormalCombine& work, Tables& t) {
        const normal::CombineArgs args{.work = work,
                                       .tables = t.tables(),
                                       .pieces = normal::Pieces::make(s.row_bytes),
                                       .group = groups[r]};
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

    void round() {
        const auto num_ranks = static_cast<size_t>(s.num_ranks);
        const bool wide = chance(2), exact = chance(2), with_experts = !chance(4);
        std::vector<Input> inputs;
        std::vector<Tables> mine(num_ranks, Tables(s)), right(num_ranks, Tables(s));
        for (size_t r = 0; r < num_ranks; ++r) inputs.push_back(draw(s, random));
        poison();
        on_hosts([&](int r) {
            hosts[r]->layout(inputs[r].routes(s.topk, wide, true), inputs[r].num_tokens,
                             s.num_experts, right[r].layout());
            hosts[r]->notify(right[r].layout(), inputs[r].num_tokens, s.num_experts, kAlignment,
                             right[r].tables(), right[r].recv_counts.data(),
                             right[r].host_counts.data());
        });
        on_devices(s.num_ranks, [&](int r) { return layout_kernel(r, inputs[r], wide, mine[r]); });
        on_devices(s.num_ranks, [&](int r) { return notify_kernel(r, inputs[r], mine[r]); });
        for (size_t r = 0; r < num_ranks; ++r) CHECK(mine[r] == right[r]);

        const auto rows = [&](int r) { return right[r].received(s, r) + (exact ? 0 : kPadding); };
        const auto routes = [&](int r) { return inputs[r].routes(s.topk, wide, with_experts); };
        on_hosts([&](int r) {
            hosts[r]->dispatch(inputs[r].rows(s), routes(r), s.num_experts, right[r].tables(),
                               normal::kLine, rows(r), exact);
        });
        on_devices(s.num_ranks, [&](int r) {
            return dispatch_kernel(r, inputs[r], routes(r), mine[r], rows(r), exact);
        });
        compare_blocks();
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
            weights[r].resize(static_cast<size_t>(s.most_rows()) * s.topk);
            for (float& w : weights[r]) w = normal(random);
        }
        const auto work = [&](int r, Combined& to) {
            return NormalCombine{reinterpret_cast<const uint8_t*>(y[r].data()),
                                 2 * stride,
                                 s.hidden(),
                                 weighted ? weights[r].data() : nullptr,
                                 s.topk,
                                 {biased ? inputs[r].bias[0].data() : nullptr,
                                  twice ? inputs[r].bias[1].data() : nullptr},
                                 inputs[r].num_tokens,
                                 normal::kLine + s.block_bytes(),
                                 to.out.data(),
                                 weighted ? to.weights.data() : nullptr};
        };
        on_hosts([&](int r) { hosts[r]->combine(work(r, wanted[r]), right[r].tables()); });
        on_devices(s.num_ranks, [&](int r) { return combine_kernel(r, work(r, got[r]), mine[r]); });
        for (size_t r = 0; r < num_ranks; ++r) {
            CHECK(got[r] == wanted[r]);
            CHECK(device.faults[r].fatal.code == 0 && host.faults[r].fatal.code == 0);
            CHECK(device.faults[r].routing.count == host.faults[r].routing.count);
        }
    }

    void compare_state(uint64_t rounds) {
        for (int r = 0; r < s.num_ranks; ++r) {
            const State& state = device.state(r);
            CHECK(state.notified == rounds && state.dispatched == rounds);
            CHECK(state.combined == rounds);
            for (const uint32_t ticket : state.tickets) CHECK(ticket == 0);
        }
    }
};

// A fresh group whose tables say that one rank's block is too small by `missing` rows.
void check_small_block(const Sizes& s, int grid) {
    Test test(s, grid, 5);
    std::vector<Input> inputs;
    std::vector<Tables> tables(static_cast<size_t>(s.num_ranks), Tables(s));
    for (int r = 0; r < s.num_ranks; ++r) {
        inputs.push_back(draw(s, test.random));
        inputs[r].num_tokens = s.max_tokens;
    }
    test.on_devices(s.num_ranks,
                    [&](int r) { return test.layout_kernel(r, inputs[r], true, tables[r]); });
    test.on_devices(s.num_ranks,
                    [&](int r) { return test.notify_kernel(r, inputs[r], tables[r]); });
    for (int r = 0; r < s.num_ranks; ++r) test.device.state(r).budget_ns = 200'000'000;
    const int victim = s.num_ranks - 1;
    const int64_t room = tables[victim].received(s, victim) - 1;
    CHECK(room >= 0);
    test.on_devices(s.num_ranks, [&](int r) {
        const int64_t rows = r == victim ? room : tables[r].received(s, r);
        return test.dispatch_kernel(r, inputs[r], inputs[r].routes(s.topk, true, true), tables[r],
                                    rows, true);
    });
    int counted = 0;
    for (int r = 0; r < s.num_ranks; ++r) {
        const Fault& fault = test.device.faults[r].fatal;
        const auto code = static_cast<FaultCode>(fault.code);
        CHECK(code == FaultCode::kCount || code == FaultCode::kAborted);
        CHECK(fault.op == static_cast<uint32_t>(Op::kNormalDispatch));
        CHECK(fault.peer == victim);
        if (code == FaultCode::kCount) {
            ++counted;
            CHECK(fault.expected == static_cast<uint64_t>(room) && fault.seen > fault.expected);
        }
        CHECK(test.device.state(r).dispatched == 0 && test.device.state(r).tickets[0] == 0);
    }
    CHECK(counted >= 1);
    // Nothing was written behind the rows: the scales come there, within the block's last line.
    const auto block = BlockLayout::make(room, s.row_bytes, s.num_scales, s.topk);
    const uint8_t* end = test.device.data[victim].get() + normal::kLine + block.bytes;
    for (int i = 0; i < normal::kLine; ++i) CHECK(end[i] == 0xab);
}

// A rank that never comes: the others name it, tell each other, and end; so does what follows.
void check_absent_rank(const Sizes& s, int grid) {
    for (const Op op : {Op::kNormalNotify, Op::kNormalDispatch, Op::kNormalCombine}) {
        Test test(s, grid, 1);
        const int absent = s.num_ranks - 1;
        std::vector<Input> inputs;
        std::vector<Tables> tables(static_cast<size_t>(s.num_ranks), Tables(s));
        for (int r = 0; r < s.num_ranks; ++r) {
            inputs.push_back(draw(s, test.random));
            inputs[r].num_tokens = s.max_tokens;
        }
        test.on_devices(s.num_ranks,
                        [&](int r) { return test.layout_kernel(r, inputs[r], true, tables[r]); });
        if (op != Op::kNormalNotify) {
            test.on_devices(s.num_ranks,
                            [&](int r) { return test.notify_kernel(r, inputs[r], tables[r]); });
        }
        for (int r = 0; r < s.num_ranks; ++r) test.device.state(r).budget_ns = 50'000'000;
        std::vector<uint16_t> y(static_cast<size_t>(s.most_rows()) * s.hidden());
        std::vector<Combined> out(static_cast<size_t>(s.num_ranks), Combined(s));
        const auto launch = [&](int r) {
            if (op == Op::kNormalNotify) return test.notify_kernel(r, inputs[r], tables[r]);
            if (op == Op::kNormalDispatch) {
                return test.dispatch_kernel(r, inputs[r], inputs[r].routes(s.topk, true, true),
                                            tables[r], tables[r].received(s, r), true);
            }
            const NormalCombine work{reinterpret_cast<const uint8_t*>(y.data()),
                                     s.row_bytes,
                                     s.hidden(),
                                     nullptr,
                                     s.topk,
                                     {nullptr, nullptr},
                                     inputs[r].num_tokens,
                                     normal::kLine + s.block_bytes(),
                                     out[r].out.data(),
                                     nullptr};
            return test.combine_kernel(r, work, tables[r]);
        };
        test.on_devices(absent, launch);
        int first = 0;
        for (int r = 0; r < absent; ++r) {
            const Fault& fault = test.device.faults[r].fatal;
            const auto code = static_cast<FaultCode>(fault.code);
            CHECK(code == FaultCode::kTimeout || code == FaultCode::kAborted);
            CHECK(fault.peer == absent && fault.op == static_cast<uint32_t>(op));
            first += code == FaultCode::kTimeout;
            for (const uint32_t ticket : test.device.state(r).tickets) CHECK(ticket == 0);
        }
        CHECK(first >= 1);
        emulator::run({launch(absent)}, test.random);
        const Fault& told = test.device.faults[absent].fatal;
        CHECK(static_cast<FaultCode>(told.code) == FaultCode::kAborted);
        CHECK(told.peer == absent);
    }
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 9);
    const auto argument = [&](int i) { return std::atoi(argv[i]); };
    const Sizes sizes{argument(1), argument(2), argument(3), argument(4), argument(5), argument(6)};
    const int grid = argument(7);
    Test test(sizes, grid, static_cast<unsigned>(argument(8)));
    for (int i = 0; i < kRoundsHere; ++i) test.round();
    test.compare_state(kRoundsHere);
    if (sizes.num_ranks > 1 && sizes.num_ranks < 6) {
        check_small_block(sizes, grid);
        check_absent_rank(sizes, grid);
    }
    std::puts("the kernels' steps and the host backend agree");
}

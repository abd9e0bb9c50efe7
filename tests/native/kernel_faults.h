// What goes wrong among emulated ranks.
#pragma once

#include "kernel_emulated.h"

#include <chrono>

namespace {

using namespace ep;

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

// A budget of so many milliseconds, on every rank.
void give_budget(const Test& test, uint64_t ms) {
    const uint64_t ns = ms * 1'000'000;
    for (const Context& ctx : test.contexts) {
        std::memcpy(ctx.local + LocalLayout::kBudgetOffset, &ns, sizeof(ns));
    }
}

// Combines of what nobody received, on a rank that has given up: its memory holds rows that are
// none.
void combine_unreceived(Test& test, const Emulated& rank, const Input& input, Output& output) {
    const Shape& shape = test.shape;
    const std::vector<uint16_t> y(Output::rows_of(shape) * shape.hidden);
    const std::vector<uint16_t> untouched(static_cast<size_t>(kMaxTokensHere) * shape.hidden);
    std::vector<uint16_t> home = untouched;
    const Routing unknown = output.route(shape);
    std::memset(unknown.received, 0x2b, sizeof(int32_t) * shape.num_ranks);
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
    emulator::run({rank.combine_send_kernel(in)}, test.random);
    emulator::run({rank.combine_recv_kernel(out)}, test.random);
    emulator::run({rank.combine_fused_kernel(in, out)}, test.random);
    CHECK(home == untouched);
}

// A rank that never comes: the others name it, tell each other, and end; so does what follows.
void check_absent_rank(const Shape& shape, Format format, int grid) {
    Test test(shape, format, grid, 1);
    const auto absent = static_cast<size_t>(shape.num_ranks - 1);
    give_budget(test, 50);
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

    combine_unreceived(test, ranks[0], input, outputs[0]);

    emulator::run({ranks[absent].dispatch_send_kernel(sent(absent))}, test.random);
    const Fault& told = test.device.faults[absent].fatal;
    CHECK(static_cast<FaultCode>(told.code) == FaultCode::kAborted);
    CHECK(told.peer == static_cast<int>(absent));
}

// One choice a token, short rows: enough where only what goes wrong matters.
Shape small_shape(int num_ranks, int num_experts) {
    return {.num_ranks = num_ranks,
            .num_experts = num_experts,
            .topk = 1,
            .hidden = 128,
            .max_tokens = kMaxTokensHere,
            .num_chains = kChains,
            .wire = Wire::kBf16,
            .opaque_row_bytes = 0,
            .opaque_scales = 0};
}

// Counts that each are possible, but not together: more rows than the messages have entries. They
// would lie beyond the received rows.
void check_too_many_rows(int grid) {
    const Shape shape = small_shape(2, 24);
    Test test(shape, Format::kContiguous, grid, 4);
    give_budget(test, 200);
    Input input = draw(shape, test.random);  // every token to the expert whose rows come last
    input.num_tokens = input.num_valid = kMaxTokensHere;
    std::ranges::fill(input.topk_idx, shape.num_experts - 1);
    std::vector<Output> outputs(2, Output(shape));
    const auto in = [&](size_t r) {
        return input.view(shape, shape.wire, false, false, outputs[r].route(shape));
    };
    test.on_all(0, shape.wire,
                [&](const Emulated& e, size_t r) { return e.dispatch_send_kernel(in(r)); });
    const Context& ctx = test.contexts[1];
    auto* counts = ctx.counts_at(1, 0, 1, 0);
    for (int x = 0; x < shape.num_local_experts(); ++x) {
        const uint32_t most = kMaxTokensHere;
        std::memcpy(counts + RecvScratch::byte_of(CountsLayout::kRows + x), &most, sizeof(most));
    }
    RecvTarget target = outputs[1].target(shape, test.format, shape.wire, false);
    target.num_rows = shape.max_messages() + shape.num_local_experts() * (kAlignment - 1);
    auto* behind = outputs[1].x.data() + target.num_rows * shape.row_bytes(shape.wire);
    const std::vector<uint8_t> before(behind, outputs[1].x.data() + outputs[1].x.size());
    emulator::run({test.emulated(ctx, 0, shape.wire).dispatch_recv_kernel(target)}, test.random);
    CHECK(static_cast<FaultCode>(test.device.faults[1].fatal.code) == FaultCode::kCount);
    CHECK(std::equal(before.begin(), before.end(), behind));
}

// What a masked rank said of others lies at a rank that has not looked yet: a real cause takes its
// place.
void check_abort_after_a_masked_one(Format format, int grid) {
    const Shape shape = small_shape(4, 4);
    Test test(shape, format, grid, 5);
    give_budget(test, 50);
    for (size_t r = 1; r < 4; ++r) {
        test.hosts[r]->set_rank_mask(0, true);
        *test.contexts[r].mask() = test.hosts[r]->read_rank_mask();
    }
    const uint64_t of_masked = pack_abort(FaultCode::kTimeout, 0, 1);
    std::memcpy(test.contexts[2].abort_word(2), &of_masked, sizeof(of_masked));
    const Input input = draw(shape, test.random);
    Output output(shape);
    emulator::run({test.emulated(test.contexts[1], 0, shape.wire)
                       .dispatch_fused_kernel(
                           input.view(shape, shape.wire, false, false, output.route(shape)),
                           output.target(shape, format, shape.wire, false))},
                  test.random);
    uint64_t told = 0;
    std::memcpy(&told, test.contexts[2].abort_word(2), sizeof(told));
    CHECK(abort_rank(told) == 1 && abort_code(told) == FaultCode::kTimeout);
}

}  // namespace

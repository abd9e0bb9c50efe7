// The CUDA steps of the normal operations, emulated, beside the host backend: same inputs, same
// bytes.
//
//   normal_steps RANKS EXPERTS ROW_BYTES SCALES TOPK TOKENS CTAS AS_OF OTHERS EVERYWHERE SEED
//
// A combine works as one of AS_OF CTAs would on rank 0, and of OTHERS on the other ranks. With
// EVERYWHERE 1 each token goes to all ranks, along a layout without topk_idx; TOPK is then that of
// the combine's weights.
//
// Rounds of layout, notify, dispatch and combine with other tokens on every rank, entries that are
// missing, out of range or repeated, and a rank that never comes at the end.
#include "normal_emulated.h"

namespace {

constexpr int kRoundsHere = 3;  // a block size each
constexpr int kFewRounds = 2;  // a parity each, where one takes seconds

// A fresh group whose tables say that one rank's block is too small by `missing` rows.
void check_small_block(const Sizes& s, int grid) {
    Test test(s, grid, grid, grid, 5);
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
                                    rows, BlockSize::kExact);
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
        CHECK(test.device.state(r).dispatched == 0);
        for (const uint32_t ticket : test.device.state(r).tickets) CHECK(ticket == 0);
    }
    CHECK(counted >= 1);
    // Nothing was written behind the rows: the scales come there, within the block's last line.
    const auto block = BlockLayout::make(room, s.row_bytes, s.num_scales, s.topk);
    const uint8_t* end = test.device.data[victim].get() + normal::kLine + block.bytes;
    for (int i = 0; i < normal::kLine; ++i) CHECK(end[i] == 0xab);
}

// A rank that announces to rank 0 what no rank can have: it is named, and nothing of it is taken.
void check_damaged_counts(const Sizes& s, int grid) {
    constexpr int32_t kMost = normal::kMaxTokensPerRank * kMaxTopk;  // rows of an expert
    for (const int32_t damaged : {-1, kMost + 1}) {
        Test test(s, grid, grid, grid, 3);
        const int culprit = s.num_ranks - 1;
        std::vector<Input> inputs;
        std::vector<Tables> tables(static_cast<size_t>(s.num_ranks), Tables(s));
        for (int r = 0; r < s.num_ranks; ++r) inputs.push_back(draw(s, test.random));
        test.on_devices(s.num_ranks,
                        [&](int r) { return test.layout_kernel(r, inputs[r], true, tables[r]); });
        tables[culprit].per_expert[0] = damaged;
        const Tables before = tables[0];
        for (int r = 0; r < s.num_ranks; ++r) test.device.state(r).budget_ns = 200'000'000;
        test.on_devices(s.num_ranks,
                        [&](int r) { return test.notify_kernel(r, inputs[r], tables[r]); });
        const Fault& found = test.device.faults[0].fatal;
        CHECK(static_cast<FaultCode>(found.code) == FaultCode::kCount);
        CHECK(found.expected == static_cast<uint64_t>(kMost));
        CHECK(found.seen == static_cast<uint32_t>(damaged));
        CHECK(test.device.state(0).notified == 0);
        for (int r = 0; r < s.num_ranks; ++r) {
            const Fault& fault = test.device.faults[r].fatal;
            if (fault.code == 0) continue;  // done before it could hear of it
            CHECK(r == 0 || static_cast<FaultCode>(fault.code) == FaultCode::kAborted);
            CHECK(fault.op == static_cast<uint32_t>(Op::kNormalNotify));
            CHECK(fault.peer == culprit);
        }
        CHECK(tables[0].prefix == before.prefix && tables[0].recv_counts == before.recv_counts);
        CHECK(tables[0].host_counts == before.host_counts);
    }
}

// A rank that never comes: the others name it, tell each other, and end; so does what follows.
void check_absent_rank(const Sizes& s, int grid) {
    for (const Op op : {Op::kNormalNotify, Op::kNormalDispatch, Op::kNormalCombine}) {
        Test test(s, grid, grid, grid, 1);
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
                                            tables[r], tables[r].received(s, r), BlockSize::kExact);
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
    CHECK(argc == 12);
    const auto argument = [&](int i) { return std::atoi(argv[i]); };
    const Sizes sizes{argument(1), argument(2), argument(3), argument(4), argument(5), argument(6)};
    const int grid = argument(7);
    Test test(sizes, grid, argument(8), argument(9), static_cast<unsigned>(argument(11)));
    test.everywhere = argument(10) != 0;
    const bool slow = sizes.num_ranks > 32 || sizes.max_tokens > 1000 || grid > 32;
    const int rounds = slow ? kFewRounds : kRoundsHere;
    for (int i = 0; i < rounds; ++i) test.round(i);
    test.compare_state(rounds);
    const bool few = sizes.num_ranks > 1 && sizes.num_ranks < 6;
    if (few && !test.everywhere && test.packed + test.raw == 0) {
        check_small_block(sizes, grid);
        check_damaged_counts(sizes, grid);
        check_absent_rank(sizes, grid);
    }
    if (test.everywhere && sizes.num_ranks > 32 && test.packed != 0) {
        check_damaged_counts(sizes, grid);  // pulled in several rounds
    }
    std::puts("the kernels' steps and the host backend agree");
    if (test.packed + test.raw != 0) std::printf("%d %d\n", test.packed, test.raw);
}

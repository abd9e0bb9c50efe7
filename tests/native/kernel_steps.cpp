// The CUDA steps, emulated, beside the host backend: the same inputs must give the same bytes.
//
//   kernel_steps FORMAT WIRE RANKS HIDDEN TOPK CTAS SEED        (0 batched, 1 contiguous, 2
//   compact; 0 BF16, 1 FP8, 2 opaque)
//
// Dispatches and combines on two chains in any order, fused and split, with other numbers of tokens
// on every rank and entries that are missing, out of range or repeated. Ranks are masked and
// unmasked on the way; combines travel as BF16 or FP8.
#include "kernel_faults.h"

int main(int argc, char** argv) {
    using namespace ep;
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
    if (num_ranks > 1 && quick) {
        check_too_many_rows(grid);
        check_abort_after_a_masked_one(format, grid);
    }
    if (num_ranks > 1) {
        for (unsigned seed = 1; seed <= 2; ++seed) check_unaware_rank(shape, format, grid, seed);
    }
    std::puts("the kernels' steps and the host backend agree");
}

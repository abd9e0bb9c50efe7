#include "cuda/combine_kernels.cuh"

namespace ep {

// With two ranks one row comes from elsewhere; waiting for two at once would cost registers.
CombineKernels bf16_combine_kernels(int num_ranks, bool late_weights) {
    return num_ranks <= 2 ? combine_kernels_of<Bf16Sums, 1>(late_weights)
                          : combine_kernels_of<Bf16Sums, 2>(late_weights);
}

}  // namespace ep

#include "cuda/combine_kernels.cuh"

namespace ep {

CombineKernels bf16_combine_kernels(bool late_weights) {
    return combine_kernels_of<Bf16Sums>(late_weights);
}

}  // namespace ep

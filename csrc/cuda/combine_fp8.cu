#include "cuda/combine_fp8.cuh"
//
#include "cuda/combine_kernels.cuh"

namespace ep {

CombineKernels fp8_combine_kernels(bool late_weights) {
    return combine_kernels_of<Fp8Sums>(late_weights);
}

}  // namespace ep

#include "cuda/dispatch_kernels.cuh"

namespace ep {

DispatchKernels fp8_dispatch_kernels(int input_vectors) {
    return dispatch_kernels_for<true>(input_vectors);
}

}  // namespace ep

#include "cuda/dispatch_kernels.cuh"

namespace ep {

DispatchKernels plain_dispatch_kernels(int input_vectors) {
    return dispatch_kernels_for<false>(input_vectors);
}

}  // namespace ep

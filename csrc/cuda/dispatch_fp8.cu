#include "cuda/dispatch_kernels.cuh"

namespace ep {

DispatchKernels fp8_dispatch_kernels(int hidden) {
    return dispatch_kernels_for<Wire::kFp8>(hidden);
}

}  // namespace ep

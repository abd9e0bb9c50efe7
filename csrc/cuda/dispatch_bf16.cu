#include "cuda/dispatch_kernels.cuh"

namespace ep {

DispatchKernels bf16_dispatch_kernels(int hidden) {
    return dispatch_kernels_for<Wire::kBf16>(hidden);
}

}  // namespace ep

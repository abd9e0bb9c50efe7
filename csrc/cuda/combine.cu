#include "cuda/combine_kernels.cuh"

namespace ep {

CombineKernels bf16_combine_kernels(bool late_weights) {
    return combine_kernels_of<Bf16Sums>(late_weights);
}

CombineKernels few_combine_kernels(bool late_weights) {
    return combine_kernels_of<Bf16HalfSums>(late_weights);
}

CombineKernels streamed_combine_kernels() {
    constexpr Weights kKnown = Weights::kKnown;
    return {combine_send_kernel<Bf16StreamedSums, kKnown>, combine_recv_kernel<Bf16Sums>,
            combine_fused_kernel<Bf16StreamedSums, kKnown>};
}

}  // namespace ep

#include "cuda/begin.cuh"
#include "cuda/combine_halves.cuh"

namespace ep {

template <Weights kWeights>
__global__ void __launch_bounds__(kThreads, 2)
    combine_send_kernel(const __grid_constant__ CombineSendArgs a) {
    combine_send<kWeights>(a.view, a.in, begin(a, Op::kCombine));
}

template <int kInFlight>
__global__ void __launch_bounds__(kThreads, 2)
    combine_recv_kernel(const __grid_constant__ CombineRecvArgs a) {
    combine_recv<kInFlight>(a.view, a.out, begin(a, Op::kCombine));
}

template <int kInFlight, Weights kWeights>
__global__ void __launch_bounds__(kThreads, 2)
    combine_fused_kernel(const __grid_constant__ CombineFusedArgs a) {
    combine_both<kInFlight, kWeights>(a.view, a.in, a.out, begin(a, Op::kCombine));
}

template <int kInFlight, Weights kWeights>
__global__ void __launch_bounds__(kThreads, 2)
    combine_once_kernel(const __grid_constant__ CombineFusedArgs a) {
    combine_once<kInFlight, kWeights>(a.view, a.in, a.out, begin(a, Op::kCombine));
}

template <int kInFlight, Weights kWeights>
static CombineKernels kernels_of() {
    return {combine_send_kernel<kWeights>, combine_recv_kernel<kInFlight>,
            combine_fused_kernel<kInFlight, kWeights>, combine_once_kernel<kInFlight, kWeights>};
}

// With two ranks one row comes from elsewhere; waiting for two at once would cost registers.
CombineKernels combine_kernels(int num_ranks, bool late_weights) {
    if (num_ranks <= 2) {
        return late_weights ? kernels_of<1, Weights::kLate>() : kernels_of<1, Weights::kKnown>();
    }
    return late_weights ? kernels_of<2, Weights::kLate>() : kernels_of<2, Weights::kKnown>();
}

}  // namespace ep

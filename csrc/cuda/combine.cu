#include "cuda/combine.cuh"

#include "cuda/begin.cuh"

namespace ep {

static constexpr int kInFlight = 2;  // ranks whose rows a combine waits for at once

__global__ void __launch_bounds__(kThreads, 2)
    combine_send_kernel(const __grid_constant__ CombineSendArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    if (reports()) check_combine_order(a.view);
    combine_send(a.view, a.in, epoch);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_recv_kernel(const __grid_constant__ CombineRecvArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    combine_recv<kInFlight>(a.view, a.out, epoch);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_fused_kernel(const __grid_constant__ CombineFusedArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    if (reports()) check_combine_order(a.view);
    combine_both<kInFlight>(a.view, a.in, a.out, epoch);
}

CombineKernels combine_kernels() {
    return {combine_send_kernel, combine_recv_kernel, combine_fused_kernel};
}

}  // namespace ep

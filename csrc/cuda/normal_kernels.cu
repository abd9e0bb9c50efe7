#include "cuda/normal_combine.cuh"
#include "cuda/normal_counts.cuh"
#include "cuda/normal_dispatch.cuh"

namespace ep::normal {

__global__ void __launch_bounds__(kCountThreads)
    normal_layout_kernel(const __grid_constant__ LayoutArgs a) {
    extern __shared__ __align__(128) uint8_t smem[];
    layout(a, smem);
}

__global__ void __launch_bounds__(kCountThreads)
    normal_notify_kernel(const __grid_constant__ NotifyArgs a) {
    extern __shared__ __align__(128) uint8_t smem[];
    notify(a, smem);
}

__global__ void __launch_bounds__(kDispatchThreads, 1)
    normal_dispatch_kernel(const __grid_constant__ DispatchArgs a) {
    extern __shared__ __align__(128) uint8_t smem[];
    dispatch(a, smem);
}

__global__ void __launch_bounds__(kCombineThreads, 1)
    normal_combine_kernel(const __grid_constant__ CombineArgs a) {
    extern __shared__ __align__(128) uint8_t smem[];
    combine(a, smem);
}

LayoutKernel layout_kernel_ptr() { return normal_layout_kernel; }
NotifyKernel notify_kernel_ptr() { return normal_notify_kernel; }
DispatchKernel dispatch_kernel_ptr() { return normal_dispatch_kernel; }
CombineKernel combine_kernel_ptr() { return normal_combine_kernel; }

int dispatch_scratch_bytes(int num_ranks) { return DispatchScratch::bytes(num_ranks); }
int combine_scratch_bytes(int num_ranks) { return CombineScratch::bytes(num_ranks); }

}  // namespace ep::normal

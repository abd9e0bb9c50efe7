// Dispatch kernels of one wire format.
#pragma once

#include "cuda/begin.cuh"
#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"

namespace ep {

template <Wire kWire, int kRowVectors>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_send_kernel(const __grid_constant__ DispatchSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const uint64_t epoch = begin(a, Op::kDispatch);
    if (reports()) check_dispatch_order(a.view);
    dispatch_send<kWire, kRowVectors>(a.view, a.in, a.stretch, epoch, smem);
}

template <Wire kWire, int kRowVectors>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_fused_kernel(const __grid_constant__ DispatchFusedArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const uint64_t epoch = begin(a, Op::kDispatch);
    if (reports()) check_dispatch_order(a.view);
    dispatch_send<kWire, kRowVectors>(a.view, a.in, a.stretch, epoch, smem);
    __syncthreads();  // the halves share the scratch memory
    dispatch_recv(a.view, a.target, epoch, smem);
}

template <Wire kWire, int kRowVectors>
DispatchKernels kernels_of() {
    return {dispatch_send_kernel<kWire, kRowVectors>, dispatch_fused_kernel<kWire, kRowVectors>};
}

template <Wire kWire>
DispatchKernels dispatch_kernels_for(int hidden) {
    const auto vectors = ceil_div(hidden / 8, kStagingThreads);
    if (vectors <= 1) return kernels_of<kWire, 1>();
    if (vectors <= 2) return kernels_of<kWire, 2>();
    return kernels_of<kWire, 5>();
}

}  // namespace ep

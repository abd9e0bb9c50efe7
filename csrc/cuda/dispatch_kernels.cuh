// Dispatch kernels of one wire format.
#pragma once

#include "cuda/begin.cuh"
#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"

namespace ep {

template <bool kQuantise, int kRowVectors>
__global__ void __launch_bounds__(kThreads, kDispatchCtas)
    dispatch_send_kernel(const __grid_constant__ DispatchSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const SendScratch scratch = SendScratch::carve(smem, a.view);
    const Turn turn = begin(a, Op::kDispatch, [&] { prepare_send(a.view, scratch); });
    dispatch_send<kQuantise, kRowVectors>(a.view, a.in, a.stretch, turn, scratch);
}

template <bool kQuantise, int kRowVectors>
__global__ void __launch_bounds__(kThreads, kDispatchCtas)
    dispatch_fused_kernel(const __grid_constant__ DispatchFusedArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const SendScratch sent = SendScratch::carve(smem, a.view);
    const RecvScratch received = RecvScratch::carve(smem + SendScratch::bytes(a.view), a.view);
    const Turn turn = begin(a, Op::kDispatch, [&] {
        prepare_send(a.view, sent);
        prepare_recv(a.view, received);
    });
    dispatch_send<kQuantise, kRowVectors>(a.view, a.in, a.stretch, turn, sent);
    dispatch_recv(a.view, a.target, turn, received);
}

template <bool kQuantise, int kRowVectors>
DispatchKernels kernels_of() {
    return {dispatch_send_kernel<kQuantise, kRowVectors>,
            dispatch_fused_kernel<kQuantise, kRowVectors>};
}

template <bool kQuantise>
DispatchKernels dispatch_kernels_for(int input_vectors) {
    const auto per_thread = ceil_div(input_vectors, kStagingThreads);
    if (per_thread <= 1) return kernels_of<kQuantise, 1>();
    if (per_thread <= 2) return kernels_of<kQuantise, 2>();
    return kernels_of<kQuantise, 5>();
}

}  // namespace ep

// Dispatch kernels of one wire format.
#pragma once

#include "cuda/begin.cuh"
#include "cuda/dispatch_rounds.cuh"
#include "cuda/dispatch_teams.cuh"

namespace ep {

template <bool kQuantise, int kRowPairs>
__global__ void __launch_bounds__(kThreads, kDispatchCtas)
    dispatch_send_kernel(const __grid_constant__ DispatchSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const SendScratch scratch = SendScratch::carve(smem, a.view);
    const Turn turn = begin(a, Op::kDispatch, [&] {
        prepare_send(a.view, scratch);
        __syncthreads();
    });
    dispatch_send<kQuantise, kRowPairs>(a.view, a.in, a.stretch, turn, scratch);
}

template <bool kQuantise, int kRowPairs>
__global__ void __launch_bounds__(kThreads, kDispatchCtas)
    dispatch_fused_kernel(const __grid_constant__ DispatchFusedArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const SendScratch sent = SendScratch::carve(smem, a.view);
    const RecvScratch received =
        RecvScratch::carve(smem + SendScratch::bytes(a.view), a.view, a.view.message_room());
    const Turn turn = begin(a, Op::kDispatch, [&] {
        prepare_send(a.view, sent);
        prepare_recv(a.view, received);
        __syncthreads();
    });
    dispatch_send<kQuantise, kRowPairs>(a.view, a.in, a.stretch, turn, sent);
    dispatch_recv(a.view, a.target, turn, received, a.part_bits);
}

// The same for many tokens.
template <bool kQuantise>
__global__ void __launch_bounds__(kThreads, kDispatchManyCtas)
    dispatch_send_many_kernel(const __grid_constant__ DispatchSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const RoundScratch scratch = RoundScratch::carve(smem, a.view);
    const Turn turn = begin(a, Op::kDispatch, [&] {
        prepare_rounds(a.view, scratch);
        __syncthreads();
    });
    dispatch_send_rounds<kQuantise>(a.view, a.in, a.stretch, turn, scratch);
}

template <bool kQuantise>
__global__ void __launch_bounds__(kThreads, kDispatchManyCtas)
    dispatch_fused_many_kernel(const __grid_constant__ DispatchFusedArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const RoundScratch sent = RoundScratch::carve(smem, a.view);
    const RecvScratch received =
        RecvScratch::carve(smem + RoundScratch::bytes(a.view), a.view, WarpScratch::kRoom);
    const Turn turn = begin(a, Op::kDispatch, [&] {
        prepare_rounds(a.view, sent);
        prepare_recv(a.view, received);
        __syncthreads();
    });
    dispatch_send_rounds<kQuantise>(a.view, a.in, a.stretch, turn, sent);
    dispatch_recv_teams(a.view, a.target, turn, received, a.first_receiver);
}

template <bool kQuantise, int kRowPairs>
DispatchKernels kernels_of() {
    return {dispatch_send_kernel<kQuantise, kRowPairs>, dispatch_fused_kernel<kQuantise, kRowPairs>,
            dispatch_send_many_kernel<kQuantise>, dispatch_fused_many_kernel<kQuantise>};
}

template <bool kQuantise>
DispatchKernels dispatch_kernels_for(int input_vectors) {
    return input_vectors <= 2 * kRowThreads ? kernels_of<kQuantise, 1>()
                                            : kernels_of<kQuantise, 3>();
}

}  // namespace ep

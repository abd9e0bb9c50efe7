#include "cuda/begin.cuh"
#include "cuda/dispatch_rounds.cuh"
#include "cuda/dispatch_teams.cuh"

namespace ep {

__global__ void __launch_bounds__(kThreads, kDispatchCtas)
    dispatch_recv_kernel(const __grid_constant__ DispatchRecvArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const RecvScratch scratch = RecvScratch::carve(smem, a.view, a.view.message_room());
    const Turn turn = begin(a, Op::kDispatch, [&] {
        prepare_recv(a.view, scratch);
        __syncthreads();
    });
    dispatch_recv(a.view, a.target, turn, scratch, a.part_bits);
}

// For many messages.
__global__ void __launch_bounds__(kThreads, kDispatchManyCtas)
    dispatch_recv_many_kernel(const __grid_constant__ DispatchRecvArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const RecvScratch scratch = RecvScratch::carve(smem, a.view, WarpScratch::kRoom);
    const Turn turn = begin(a, Op::kDispatch, [&] {
        prepare_recv(a.view, scratch);
        __syncthreads();
    });
    dispatch_recv_teams(a.view, a.target, turn, scratch, 1);
}

RecvKernels dispatch_recv_kernels() { return {dispatch_recv_kernel, dispatch_recv_many_kernel}; }

DispatchScratch dispatch_scratch(const View& view) {
    return {SendScratch::bytes(view), RecvScratch::bytes(view, view.message_room())};
}
DispatchScratch dispatch_many_scratch(const View& view) {
    return {RoundScratch::bytes(view), RecvScratch::bytes(view, WarpScratch::kRoom)};
}

}  // namespace ep

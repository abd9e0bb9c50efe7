#include "cuda/dispatch_recv.cuh"

#include "cuda/begin.cuh"
#include "cuda/dispatch_send.cuh"

namespace ep {

__global__ void __launch_bounds__(kThreads, kDispatchCtas)
    dispatch_recv_kernel(const __grid_constant__ DispatchRecvArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const RecvScratch scratch = RecvScratch::carve(smem, a.view);
    const Turn turn = begin(a, Op::kDispatch, [&] { prepare_recv(a.view, scratch); });
    dispatch_recv(a.view, a.target, turn, scratch);
}

RecvKernel dispatch_recv_kernel_ptr() { return dispatch_recv_kernel; }

DispatchScratch dispatch_scratch(const View& view) {
    return {SendScratch::bytes(view), RecvScratch::bytes(view)};
}

}  // namespace ep

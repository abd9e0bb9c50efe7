#include "cuda/dispatch_recv.cuh"

#include "cuda/begin.cuh"
#include "cuda/dispatch_send.cuh"

namespace ep {

__global__ void __launch_bounds__(kThreads, kDispatchCtas)
    dispatch_recv_kernel(const __grid_constant__ DispatchRecvArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    dispatch_recv(a.view, a.target, begin(a, Op::kDispatch), smem);
}

RecvKernel dispatch_recv_kernel_ptr() { return dispatch_recv_kernel; }

int send_scratch_bytes(const View& view) { return SendScratch::bytes(view); }
int recv_scratch_bytes(const View& view) { return RecvScratch::bytes(view); }

}  // namespace ep

// The kernels: each is a table of contents of the steps beside it.
//
// Launch contract: kThreads threads, dynamic shared memory as the step's scratch says. The split
// kernels take any grid of at least two CTAs (dispatch_send) or one; the fused ones need every CTA
// resident at once, since a CTA that waits must not keep another from sending.
#pragma once

#include "cuda/combine.cuh"
#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"

namespace ep {

inline constexpr int kThreads = 512;

struct DispatchSendArgs {
    Context ctx;
    int32_t chain;
    SendInput in;
};
struct DispatchRecvArgs {
    Context ctx;
    int32_t chain;
    RecvTarget target;
};
struct DispatchFusedArgs {
    Context ctx;
    int32_t chain;
    SendInput in;
    RecvTarget target;
};
struct CombineSendArgs {
    Context ctx;
    int32_t chain;
    CombineInput in;
};
struct CombineRecvArgs {
    Context ctx;
    int32_t chain;
    CombineOutput out;
};
struct CombineFusedArgs {
    Context ctx;
    int32_t chain;
    CombineInput in;
    CombineOutput out;
};

// Every kernel starts so: nothing of earlier kernels is read before the wait. The CTA decides as
// one whether it runs, since a peer may set the abort word between two threads' looks at it.
__device__ __forceinline__ bool begin(const Context& ctx, Op op, int chain) {
    ptx::allow_next_kernel();
    ptx::await_previous_kernel();
    return __syncthreads_or(aborted(ctx, op, chain)) == 0;
}

__device__ __forceinline__ bool reports() { return blockIdx.x == 0 && threadIdx.x == 0; }

__global__ void __launch_bounds__(kThreads, 2)
    dispatch_send_kernel(const __grid_constant__ DispatchSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    if (!begin(a.ctx, Op::kDispatch, a.chain)) return;
    const uint64_t epoch = a.ctx.state(a.chain)->combined + 1;
    if (reports()) check_dispatch_order(a.ctx, a.chain);
    dispatch_send<kThreads>(a.ctx, a.in, a.chain, epoch, smem);
}

__global__ void __launch_bounds__(kThreads, 3)
    dispatch_recv_kernel(const __grid_constant__ DispatchRecvArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    if (!begin(a.ctx, Op::kDispatch, a.chain)) return;
    const uint64_t epoch = a.ctx.state(a.chain)->combined + 1;
    dispatch_recv<kThreads>(a.ctx, a.target, a.chain, epoch, smem);
}

__global__ void __launch_bounds__(kThreads, 2)
    dispatch_fused_kernel(const __grid_constant__ DispatchFusedArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    if (!begin(a.ctx, Op::kDispatch, a.chain)) return;
    const uint64_t epoch = a.ctx.state(a.chain)->combined + 1;
    if (reports()) check_dispatch_order(a.ctx, a.chain);
    dispatch_send<kThreads>(a.ctx, a.in, a.chain, epoch, smem);
    __syncthreads();  // the halves share the scratch memory
    dispatch_recv<kThreads>(a.ctx, a.target, a.chain, epoch, smem);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_send_kernel(const __grid_constant__ CombineSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    if (!begin(a.ctx, Op::kCombine, a.chain)) return;
    const uint64_t epoch = a.ctx.state(a.chain)->dispatched;
    if (reports()) check_combine_order(a.ctx, a.chain);
    combine_send<kThreads>(a.ctx, a.in, a.chain, epoch, reinterpret_cast<int32_t*>(smem));
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_recv_kernel(const __grid_constant__ CombineRecvArgs a) {
    if (!begin(a.ctx, Op::kCombine, a.chain)) return;
    const uint64_t epoch = a.ctx.state(a.chain)->dispatched;
    combine_recv<kThreads>(a.ctx, a.out, a.chain, epoch);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_fused_kernel(const __grid_constant__ CombineFusedArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    if (!begin(a.ctx, Op::kCombine, a.chain)) return;
    const uint64_t epoch = a.ctx.state(a.chain)->dispatched;
    if (reports()) check_combine_order(a.ctx, a.chain);
    combine_send<kThreads>(a.ctx, a.in, a.chain, epoch, reinterpret_cast<int32_t*>(smem));
    combine_recv<kThreads>(a.ctx, a.out, a.chain, epoch);
}

}  // namespace ep

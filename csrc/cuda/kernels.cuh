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

// The context comes last: with few ranks most of its peer table is never touched.
struct alignas(16) DispatchSendArgs {
    int32_t chain;
    SendInput in;
    Context ctx;
};
struct alignas(16) DispatchRecvArgs {
    int32_t chain;
    RecvTarget target;
    Context ctx;
};
struct alignas(16) DispatchFusedArgs {
    int32_t chain;
    SendInput in;
    RecvTarget target;
    Context ctx;
};
struct alignas(16) CombineSendArgs {
    int32_t chain;
    CombineInput in;
    RowParts parts;
    Context ctx;
};
struct alignas(16) CombineRecvArgs {
    int32_t chain;
    CombineOutput out;
    RowParts parts;
    Context ctx;
};
struct alignas(16) CombineFusedArgs {
    int32_t chain;
    CombineInput in;
    CombineOutput out;
    RowParts parts;
    Context ctx;
};

// Copies a kernel's arguments to shared memory while the kernel before it still runs. Left where
// they are, every first look at one of their lines would be a constant-cache miss on the way to the
// wire. Each warp takes a line or so: the misses overlap.
template <class Args>
__device__ __forceinline__ const Args& stage(const Args& param) {
    __shared__ Args staged;
    constexpr int kWords = sizeof(Args) / sizeof(uint4);
    constexpr int kWordsPerLine = 4;
    const int lane = threadIdx.x & 31;
    const auto* from = reinterpret_cast<const uint4*>(&param);
    auto* to = reinterpret_cast<uint4*>(&staged);
    for (int line = threadIdx.x / 32; line * kWordsPerLine < kWords; line += kThreads / 32) {
        const int i = line * kWordsPerLine + lane;
        if (lane < kWordsPerLine && i < kWords) to[i] = from[i];
    }
    __syncthreads();
    return staged;
}

// Every kernel starts so: nothing of earlier kernels is read before the wait, and no more than one
// kernel is let in behind this one.
__device__ __forceinline__ void begin() {
    ptx::await_previous_kernel();
    ptx::allow_next_kernel();
}

// A group that gave up is not asked about here: sends then write what nobody reads, and waits
// notice. That saves every kernel a load on its way to the wire.
__device__ __forceinline__ uint64_t dispatch_epoch(const Context& ctx, int chain) {
    return ctx.state(chain)->combined + 1;
}
__device__ __forceinline__ uint64_t combine_epoch(const Context& ctx, int chain) {
    return ctx.state(chain)->dispatched;
}

__device__ __forceinline__ bool reports() { return blockIdx.x == 0 && threadIdx.x == 0; }

__global__ void __launch_bounds__(kThreads, 2)
    dispatch_send_kernel(const __grid_constant__ DispatchSendArgs param) {
    extern __shared__ __align__(16) uint8_t smem[];
    const DispatchSendArgs& a = stage(param);
    begin();
    const uint64_t epoch = dispatch_epoch(a.ctx, a.chain);
    if (reports()) check_dispatch_order(a.ctx, a.chain);
    dispatch_send<kThreads>(a.ctx, a.in, a.chain, epoch, smem);
}

__global__ void __launch_bounds__(kThreads, 2)
    dispatch_recv_kernel(const __grid_constant__ DispatchRecvArgs param) {
    extern __shared__ __align__(16) uint8_t smem[];
    const DispatchRecvArgs& a = stage(param);
    begin();
    dispatch_recv<kThreads>(a.ctx, a.target, a.chain, dispatch_epoch(a.ctx, a.chain), smem);
}

__global__ void __launch_bounds__(kThreads, 2)
    dispatch_fused_kernel(const __grid_constant__ DispatchFusedArgs param) {
    extern __shared__ __align__(16) uint8_t smem[];
    const DispatchFusedArgs& a = stage(param);
    begin();
    const uint64_t epoch = dispatch_epoch(a.ctx, a.chain);
    if (reports()) check_dispatch_order(a.ctx, a.chain);
    dispatch_send<kThreads>(a.ctx, a.in, a.chain, epoch, smem);
    __syncthreads();  // the halves share the scratch memory
    dispatch_recv<kThreads>(a.ctx, a.target, a.chain, epoch, smem);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_send_kernel(const __grid_constant__ CombineSendArgs param) {
    const CombineSendArgs& a = stage(param);
    begin();
    const uint64_t epoch = combine_epoch(a.ctx, a.chain);
    if (reports()) check_combine_order(a.ctx, a.chain);
    combine_send<kThreads, OwnRows::kThroughInbox>(a.ctx, a.parts, a.in, a.chain, epoch);
}

template <int kInFlight>
__global__ void __launch_bounds__(kThreads, 2)
    combine_recv_kernel(const __grid_constant__ CombineRecvArgs param) {
    const CombineRecvArgs& a = stage(param);
    begin();
    combine_recv<kThreads, kInFlight, OwnRows::kThroughInbox>(a.ctx, a.parts, {}, a.out, a.chain,
                                                              combine_epoch(a.ctx, a.chain));
}

template <int kInFlight>
__global__ void __launch_bounds__(kThreads, 2)
    combine_fused_kernel(const __grid_constant__ CombineFusedArgs param) {
    const CombineFusedArgs& a = stage(param);
    begin();
    const uint64_t epoch = combine_epoch(a.ctx, a.chain);
    if (reports()) check_combine_order(a.ctx, a.chain);
    combine_send<kThreads, OwnRows::kDirect>(a.ctx, a.parts, a.in, a.chain, epoch);
    combine_recv<kThreads, kInFlight, OwnRows::kDirect>(a.ctx, a.parts, a.in, a.out, a.chain,
                                                        epoch);
}

}  // namespace ep

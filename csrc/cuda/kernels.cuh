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

struct DispatchSendArgs {
    SendInput in;
    int32_t stretch;  // tokens of one CTA
    View view;
};
struct DispatchRecvArgs {
    RecvTarget target;
    View view;
};
struct DispatchFusedArgs {
    SendInput in;
    int32_t stretch;
    RecvTarget target;
    View view;
};
struct CombineSendArgs {
    CombineInput in;
    View view;
};
struct CombineRecvArgs {
    CombineOutput out;
    View view;
};
struct CombineFusedArgs {
    CombineInput in;
    CombineOutput out;
    View view;
};

// Looks at every line of a kernel's arguments while the kernel before it still runs: each first
// look is a constant-cache miss that would otherwise lie on the way to the wire. A warp takes a
// line.
template <class Args>
__device__ __forceinline__ void fetch_arguments(const Args& args) {
    constexpr int kLine = 64;
    const auto* words = reinterpret_cast<const int32_t*>(&args);
#pragma unroll
    for (int line = 0; line < static_cast<int>(sizeof(Args)) / kLine; ++line) {
        if (threadIdx.x / 32 == line % (kThreads / 32)) ptx::keep(words[line * kLine / 4]);
    }
}

// Every kernel starts so: nothing of earlier kernels is read before the wait, and no more than one
// kernel is let in behind this one. Returns the epoch the operation works at, or 0: the group gave
// up. The CTA decides as one, since a peer may set the abort word between two threads' looks at it.
template <class Args>
__device__ __forceinline__ uint64_t begin(const Args& args, Op op) {
    fetch_arguments(args);
    ptx::await_previous_kernel();
    ptx::allow_next_kernel();
    const View& view = args.view;
    const uint64_t abort = ptx::load_relaxed_sys(abort_word(view, view.rank));
    const uint64_t epoch = op == Op::kDispatch ? view.state->combined + 1 : view.state->dispatched;
    if (__syncthreads_or(abort != 0) == 0) return epoch;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        record_abort(view, op, ptx::load_relaxed_sys(abort_word(view, view.rank)));
    }
    return 0;
}

__device__ __forceinline__ bool reports() { return blockIdx.x == 0 && threadIdx.x == 0; }

template <Wire kWire, int kRowVectors>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_send_kernel(const __grid_constant__ DispatchSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const uint64_t epoch = begin(a, Op::kDispatch);
    if (epoch == 0) return;
    if (reports()) check_dispatch_order(a.view);
    dispatch_send<kWire, kRowVectors>(a.view, a.in, a.stretch, epoch, smem);
}

template <int kHeld>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_recv_kernel(const __grid_constant__ DispatchRecvArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const uint64_t epoch = begin(a, Op::kDispatch);
    if (epoch == 0) return;
    dispatch_recv<kHeld>(a.view, a.target, epoch, smem);
}

// FP8 rows of up to 7168 channels, with their metadata, are one vector a thread.
template <Wire kWire, int kRowVectors>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_fused_kernel(const __grid_constant__ DispatchFusedArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const uint64_t epoch = begin(a, Op::kDispatch);
    if (epoch == 0) return;
    if (reports()) check_dispatch_order(a.view);
    dispatch_send<kWire, kRowVectors>(a.view, a.in, a.stretch, epoch, smem);
    __syncthreads();  // the halves share the scratch memory
    dispatch_recv<kWire == Wire::kFp8 && kRowVectors <= 2 ? 1 : 2>(a.view, a.target, epoch, smem);
}

__global__ void __launch_bounds__(kThreads, 2)
    combine_send_kernel(const __grid_constant__ CombineSendArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    if (epoch == 0) return;
    if (reports()) check_combine_order(a.view);
    combine_send(a.view, a.in, epoch);
}

template <int kInFlight>
__global__ void __launch_bounds__(kThreads, 2)
    combine_recv_kernel(const __grid_constant__ CombineRecvArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    if (epoch == 0) return;
    combine_recv<kInFlight>(a.view, a.out, epoch);
}

template <int kInFlight>
__global__ void __launch_bounds__(kThreads, 2)
    combine_fused_kernel(const __grid_constant__ CombineFusedArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    if (epoch == 0) return;
    if (reports()) check_combine_order(a.view);
    combine_both<kInFlight>(a.view, a.in, a.out, epoch);
}

}  // namespace ep

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
    constexpr int kWords = 64 / sizeof(int32_t);
    const int at = static_cast<int>(threadIdx.x / 32) * kWords;
    if (at < static_cast<int>(sizeof(Args) / sizeof(int32_t))) {
        ptx::keep(reinterpret_cast<const int32_t*>(&args)[at]);
    }
}

// Every kernel starts so: nothing of earlier kernels is read before the wait, and no more than one
// kernel is let in behind this one. Returns the epoch the operation works at.
//
// A group that gave up is reported, not obeyed: its sends write what nobody reads, and its waits
// end at their first check. To stop here, a whole CTA would have to agree first, on the way to the
// wire.
template <class Args>
__device__ __forceinline__ uint64_t begin(const Args& args, Op op) {
    const View& view = args.view;
    if (view.starts_early) fetch_arguments(args);
    ptx::await_previous_kernel();
    ptx::allow_next_kernel();
    const uint64_t epoch = op == Op::kDispatch ? view.state->combined + 1 : view.state->dispatched;
    if (blockIdx.x == 0 && threadIdx.x == kThreads - 1) {
        const uint64_t word = ptx::load_relaxed_sys(abort_word(view, view.rank));
        if (word != 0) record_abort(view, op, word);
    }
    return epoch;
}

__device__ __forceinline__ bool reports() { return blockIdx.x == 0 && threadIdx.x == 0; }

template <Wire kWire, int kRowVectors>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_send_kernel(const __grid_constant__ DispatchSendArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    const uint64_t epoch = begin(a, Op::kDispatch);
    if (reports()) check_dispatch_order(a.view);
    dispatch_send<kWire, kRowVectors>(a.view, a.in, a.stretch, epoch, smem);
}

__global__ void __launch_bounds__(kThreads, 2)
    dispatch_recv_kernel(const __grid_constant__ DispatchRecvArgs a) {
    extern __shared__ __align__(16) uint8_t smem[];
    dispatch_recv(a.view, a.target, begin(a, Op::kDispatch), smem);
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

__global__ void __launch_bounds__(kThreads, 2)
    combine_send_kernel(const __grid_constant__ CombineSendArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    if (reports()) check_combine_order(a.view);
    combine_send(a.view, a.in, epoch);
}

template <int kInFlight>
__global__ void __launch_bounds__(kThreads, 2)
    combine_recv_kernel(const __grid_constant__ CombineRecvArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    combine_recv<kInFlight>(a.view, a.out, epoch);
}

template <int kInFlight>
__global__ void __launch_bounds__(kThreads, 2)
    combine_fused_kernel(const __grid_constant__ CombineFusedArgs a) {
    const uint64_t epoch = begin(a, Op::kCombine);
    if (reports()) check_combine_order(a.view);
    combine_both<kInFlight>(a.view, a.in, a.out, epoch);
}

}  // namespace ep

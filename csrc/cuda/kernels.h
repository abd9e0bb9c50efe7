// The kernels as the launcher sees them: arguments, shared memory, and which kernel serves a shape.
//
// Launch contract: kThreads threads (of combines kCombineThreads), dynamic shared memory as below,
// at least two CTAs, and three where a combine does both halves. Of the fused kernels every CTA
// must be resident at once, since one that waits must not keep another from sending.
#pragma once

#include "cuda/view.h"

namespace ep {

// CTAs to an SM, which decide how many registers a thread may have.
inline constexpr int kDispatchCtas = 2;
inline constexpr int kCombineCtas = 2;

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
    int32_t send_ctas;
    CombineOutput out;
    View view;
};

// Compiled for whether they quantise and for the row vectors of a thread (1, 2 or 5: rows of up to
// 480, 960 or 2400 vectors as the caller gives them).
struct DispatchKernels {
    void (*send)(DispatchSendArgs);
    void (*fused)(DispatchFusedArgs);
};
DispatchKernels plain_dispatch_kernels(int input_vectors);
DispatchKernels fp8_dispatch_kernels(int input_vectors);

using RecvKernel = void (*)(DispatchRecvArgs);
RecvKernel dispatch_recv_kernel_ptr();

struct CombineKernels {
    void (*send)(CombineSendArgs);
    void (*recv)(CombineRecvArgs);
    void (*fused)(CombineFusedArgs);
};
// Compiled for what sums travel as.
CombineKernels bf16_combine_kernels(bool late_weights);
CombineKernels fp8_combine_kernels(bool late_weights);

// Bytes of dynamic shared memory of the halves of dispatch. The fused kernel has both, the send's
// first.
struct DispatchScratch {
    int send;
    int recv;
};
DispatchScratch dispatch_scratch(const View& view);

}  // namespace ep

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
inline constexpr int kDispatchManyCtas = 1;
inline constexpr int kCombineCtas = 2;

struct DispatchSendArgs {
    SendInput in;
    int32_t stretch;  // tokens of one CTA
    View view;
};
struct DispatchRecvArgs {
    RecvTarget target;
    int32_t part_bits;  // a CTA receives one of 2^part_bits parts of a message at a time
    View view;
};
struct DispatchFusedArgs {
    SendInput in;
    int32_t stretch;
    int32_t first_receiver;  // CTA of the kernel for many tokens; those before it only send
    int32_t part_bits;  // of the other kernel, as above
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

// Compiled for whether they quantise and for the pairs of a row's vectors that a thread takes (1 or
// 3: rows of up to 896 or 2688 vectors as the caller gives them). The kernels for many tokens serve
// any row.
struct DispatchKernels {
    void (*send)(DispatchSendArgs);
    void (*fused)(DispatchFusedArgs);
    void (*send_many)(DispatchSendArgs);
    void (*fused_many)(DispatchFusedArgs);
};
DispatchKernels plain_dispatch_kernels(int input_vectors);
DispatchKernels fp8_dispatch_kernels(int input_vectors);

struct RecvKernels {
    void (*recv)(DispatchRecvArgs);
    void (*recv_many)(DispatchRecvArgs);
};
RecvKernels dispatch_recv_kernels();

struct CombineKernels {
    void (*send)(CombineSendArgs);
    void (*recv)(CombineRecvArgs);
    void (*fused)(CombineFusedArgs);
};
// Compiled for what sums travel as.
CombineKernels bf16_combine_kernels(bool late_weights);
CombineKernels fp8_combine_kernels(bool late_weights);
// For few units of BF16: two warps to each.
CombineKernels few_combine_kernels(bool late_weights);
// For so many that their rows do not fit into L2 with the inbox; of known weights.
CombineKernels streamed_combine_kernels();

// Bytes of dynamic shared memory of the halves of dispatch. The fused kernel has both, the send's
// first.
struct DispatchScratch {
    int send;
    int recv;
};
DispatchScratch dispatch_scratch(const View& view);
DispatchScratch dispatch_many_scratch(const View& view);

}  // namespace ep

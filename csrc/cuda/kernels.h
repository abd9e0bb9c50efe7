// The kernels as the launcher sees them: arguments, shared memory, and which kernel serves a shape.
//
// Launch contract: kThreads threads, dynamic shared memory as below. The split kernels take any
// grid of at least two CTAs (dispatch send) or one; the fused ones need every CTA resident at once,
// since a CTA that waits must not keep another from sending.
#pragma once

#include "cuda/view.h"

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

// Dispatch kernels are compiled for whether they quantise and for the row vectors of a thread (1, 2
// or 5: rows of up to 480, 960 or 2400 vectors as the caller gives them).
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
    void (*once)(CombineFusedArgs);  // fused, where the grid has a CTA for every item
};
CombineKernels combine_kernels(int num_ranks, bool late_weights);

// Dynamic shared memory of the halves of dispatch; the fused kernel needs the larger.
int send_scratch_bytes(const View& view);
int recv_scratch_bytes(const View& view);

}  // namespace ep

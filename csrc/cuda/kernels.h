// The kernels as the launcher sees them: arguments, shared memory, and which kernel serves a shape.
//
// Launch contract: kThreads threads, dynamic shared memory as below. The split kernels take any
// grid of at least two CTAs (dispatch send) or one; the fused ones need every CTA resident at once,
// since a CTA that waits must not keep another from sending.
#pragma once

#include "cuda/view.h"

namespace ep {

struct CombineInput {
    const uint16_t* y;  // rows as the receive laid them out, BF16
    int64_t row_stride;  // elements
};

struct CombineOutput {
    uint16_t* out;  // [T, H]
    int32_t num_tokens;
    const int32_t* num_valid;  // device scalar; nullptr: all rows are real
};

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

// Dispatch kernels are compiled for a wire format and for the row vectors of a thread (1, 2 or 5:
// hidden up to 3840, 7680, 16384).
struct DispatchKernels {
    void (*send)(DispatchSendArgs);
    void (*fused)(DispatchFusedArgs);
};
DispatchKernels bf16_dispatch_kernels(int hidden);
DispatchKernels fp8_dispatch_kernels(int hidden);

using RecvKernel = void (*)(DispatchRecvArgs);
RecvKernel dispatch_recv_kernel_ptr();

struct CombineKernels {
    void (*send)(CombineSendArgs);
    void (*recv)(CombineRecvArgs);
    void (*fused)(CombineFusedArgs);
};
CombineKernels combine_kernels();

// Dynamic shared memory of the halves of dispatch; the fused kernel needs the larger.
int send_scratch_bytes(const View& view);
int recv_scratch_bytes(const View& view);

}  // namespace ep

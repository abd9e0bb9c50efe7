// Who does what in a CTA that dispatches: two warps have work of their own, so that what one warp
// can do alone does not lie on the way of the row.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/view.h"

namespace ep {

// The clerk waits for counts while others push, and copies scales at the end. The router finds out
// where the CTA's token goes, then where the CTA's message does. The warps before them hold rows.
inline constexpr int kClerk = kThreads / 32 - 2;
inline constexpr int kRouter = kThreads / 32 - 1;
static_assert(kRowThreads == 32 * kClerk);

__device__ __forceinline__ int this_warp() { return static_cast<int>(threadIdx.x / 32); }

// All that send: the clerk does not.
inline constexpr int kSendThreads = kThreads - 32;
__device__ __forceinline__ int send_thread() {
    const int thread = static_cast<int>(threadIdx.x);
    return thread < kRowThreads ? thread : thread - 32;
}

}  // namespace ep

// How every kernel starts. The kernels themselves are tables of contents of the steps beside them.
#pragma once

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"
#include "cuda/watch.cuh"

namespace ep {

// Looks at every line of a kernel's arguments while the kernel before it still runs: each first
// look is a constant-cache miss that would otherwise lie on the way to the wire. A warp takes two
// lines: that covers everything but the far end of the table of peers.
template <class Args>
__device__ __forceinline__ void fetch_arguments(const Args& args, int threads) {
    constexpr int kWords = 64 / sizeof(int32_t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int at = (static_cast<int>(threadIdx.x) + i * threads) / 32 * kWords;
        if (at < static_cast<int>(sizeof(Args) / sizeof(int32_t))) {
            ptx::keep(reinterpret_cast<const int32_t*>(&args)[at]);
        }
    }
}

// Every kernel starts so: nothing of earlier kernels is read before the wait, and no more than one
// kernel is let in behind this one. Returns what the operation works at. `prepare`: what needs only
// shared memory, done while the kernel before still runs; what it wrote is there for the whole CTA.
// `ask`: loads of what earlier kernels left, asked for before this waits for anything itself.
//
// A group that gave up is reported, not obeyed: its sends write what nobody reads, and its waits
// end at their first check. To stop here, a whole CTA would have to agree first, on the way to the
// wire. But where this rank gave up itself, no warp of a combine does anything: its chain has ended
// (end_chain), which a warp finds where it reads its epoch.
template <class Args, class Prepare, class Ask>
__device__ __forceinline__ Turn begin(const Args& args, Op op, Prepare prepare, Ask ask) {
    const View& view = args.view;
    const int threads = op == Op::kDispatch ? kThreads : kCombineThreads;
    if (view.starts_early) fetch_arguments(args, threads);
    prepare();
    ptx::await_previous_kernel();
    ptx::allow_next_kernel();
    ask();
    const ChainState& state = *view.state;
    uint64_t epoch = (op == Op::kDispatch ? state.dispatched : state.combined) + 1;
    const Absent absent = Absent::load(view);
    if (op == Op::kCombine && __any_sync(kFullWarp, epoch == 0)) epoch = 0;
    if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) == threads - 1) {
        const uint64_t word = ptx::load_relaxed_sys(abort_word(view, view.rank));
        if (word != 0) heed_abort(view, op, word);
    }
    return {epoch, absent};
}
template <class Args, class Prepare>
__device__ __forceinline__ Turn begin(const Args& args, Op op, Prepare prepare) {
    return begin(args, op, prepare, [] {});
}
template <class Args>
__device__ __forceinline__ Turn begin(const Args& args, Op op) {
    return begin(args, op, [] {});
}

}  // namespace ep

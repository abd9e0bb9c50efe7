// Where a message goes.
#pragma once

#include "cuda/watch.cuh"

namespace ep {

// The ranks in the order in which messages are pushed: the next one first, so that ranks do not all
// write to the same one at once.
__device__ __forceinline__ int turn_of(const View& view, int rank) {
    const int turn = rank - view.rank - 1;
    return turn < 0 ? turn + view.num_ranks : turn;
}
__device__ __forceinline__ int rank_at(const View& view, int turn) {
    const int rank = view.rank + 1 + turn;
    return rank < view.num_ranks ? rank : rank - view.num_ranks;
}

// This rank's inbox at the rank whose turn it is; any rank's past the last.
__device__ __forceinline__ uint8_t* inbox_at(const View& view, int turn, uint64_t epoch) {
    const int rank = rank_at(view, min(turn, view.num_ranks - 1));
    return view.peer[rank] + view.dispatch_out + view.dispatch_at(epoch);
}

// The slots that a message goes to, in shared memory: their addresses, at most R, follow the count.
struct Destinations {
    int64_t count;

    static EP_HD int bytes(const View& view) { return 8 * (1 + view.num_ranks); }
    __device__ __forceinline__ uint8_t** slots() { return reinterpret_cast<uint8_t**>(this + 1); }

    // One warp. Lane i: whether the message goes to the rank whose turn is `base` + i, behind
    // `known` others, and where. Returns how many are known then.
    __device__ __forceinline__ int add(int known, bool goes, uint8_t* to) {
        const unsigned going = __ballot_sync(kFullWarp, goes);
        const unsigned before = (1u << (threadIdx.x & 31)) - 1;
        if (goes) slots()[known + __popc(going & before)] = to;
        return known + __popc(going);
    }
};

}  // namespace ep

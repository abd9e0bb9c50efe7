// The halves of combine, apart and as one, and how an operation comes to its end.
#pragma once

#include "cuda/combine.cuh"

namespace ep {

struct CombineTokens {
    int rows;  // of the output
    int valid;  // that were dispatched
};

__device__ __forceinline__ CombineTokens combine_tokens(const View& view,
                                                        const CombineOutput& out) {
    const int rows = min(out.num_tokens, view.max_tokens);
    return {rows, out.num_valid == nullptr ? rows : min(rows, *out.num_valid)};
}

__device__ __forceinline__ void note_combined(const View& view, const Routing& routing) {
    uint64_t messages = 0;
#pragma unroll 1
    for (int s = 0; s < view.num_ranks; ++s) messages += routing.received[s];
    view.stats->bytes_combined += 2ULL * view.hidden * messages;
}

// CTA 0's first warp tells every rank that this one has finished its last combine but one. That is
// what lets a peer use the inbox of this parity again: it waits for the same word of this epoch in
// its receive, and sends to that inbox only in the combine after the next.
__device__ __forceinline__ void announce_combine(const View& view, uint64_t epoch) {
    if (blockIdx.x != 0 || threadIdx.x >= 32) return;
    const int64_t line = view.ready_out + (epoch & 1) * view.num_ranks * kLineBytes;
#pragma unroll 1
    for (int r = threadIdx.x; r < view.num_ranks; r += 32) {
        ptx::store_line_vector(view.peer[r] + line, {0, epoch});
    }
}

// The warp that keeps order: the last, which has no part of a row with most hidden sizes.
__device__ __forceinline__ bool keeps_order() { return threadIdx.x >= kThreads - 32; }

// CTA 0's last warp, after its own sends: all ranks are in this combine, all CTAs of this one know
// its epoch. False: gave up.
__device__ __noinline__ inline bool settle_combine(const View& view, int64_t* wait_ns,
                                                   uint64_t epoch) {
    Watch watch{view, Op::kCombine};
    const uint8_t* lines = view.ready_in + (epoch & 1) * view.num_ranks * kLineBytes;
    const uint64_t start = ptx::global_timer_ns();
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        const int r = base + static_cast<int>(threadIdx.x & 31);
        const uint8_t* from[1] = {r < view.num_ranks ? lines + r * kLineBytes : nullptr};
        const int peers[1] = {r};
        ptx::Vector v[1];
        if (!await_vectors<1>(watch, from, peers, true, epoch, v)) return false;
        if (wait_ns != nullptr && from[0] != nullptr) {
            wait_ns[r] += ptx::global_timer_ns() - start;
        }
    }
    advance(view.state->combined, view.state->combine_readers, epoch);
    return true;
}

// Every kernel that ends a combine calls this early. One warp alone stays for the others.
__device__ __forceinline__ void report_combine_reader(const View& view, uint64_t epoch) {
    if (!keeps_order()) {
        ptx::arrive_with<kThreads>(epoch);
        return;
    }
    ptx::await_arrivals<kThreads>();
    if (threadIdx.x == kThreads - 32) report_epoch_read(view.state->combine_readers);
}

// The halves apart, each by the whole grid. Warps that gave up leave one by one: no barrier
// follows, and the abort word stops whatever comes next.
template <Weights kWeights>
__device__ __forceinline__ void combine_send(const View& view, const CombineInput& in,
                                             uint64_t epoch) {
    constexpr OwnRows kOwn = OwnRows::kThroughInbox;
    announce_combine(view, epoch);
    if (kWeights == Weights::kLate) push_weights(view, in, epoch);
    const int most = most_received(view, in.routing);
    Watch watch{view, Op::kCombine};
#pragma unroll 1
    for (int item = blockIdx.x;; item += gridDim.x) {
        const SendItem next = SendItem::of<kOwn>(view, item);
        if (next.slot >= most || !send_item<kWeights>(view, in, watch, next, epoch)) break;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) note_combined(view, in.routing);
}

template <int kInFlight>
__device__ __forceinline__ void combine_recv(const View& view, const CombineOutput& out,
                                             uint64_t epoch) {
    report_combine_reader(view, epoch);
    const CombineTokens tokens = combine_tokens(view, out);
    Watch watch{view, Op::kCombine};
    if (blockIdx.x == 0 && keeps_order() && !settle_combine(view, out.wait_ns, epoch)) {
        return;
    }
#pragma unroll 1
    for (int item = blockIdx.x;; item += gridDim.x) {
        const int token = view.by_parts(item);
        if (token >= tokens.rows) break;
        if (!recv_item<kInFlight, OwnRows::kThroughInbox, Weights::kKnown>(
                view, {}, out, watch, item - token * view.parts, token, tokens.valid, epoch)) {
            break;
        }
    }
}

// Both halves at once. A CTA takes up token t only when its own sends for slots up to t are done,
// so by induction over slot numbers every send is reached; `lag` leaves the rows time to arrive.
template <int kInFlight, Weights kWeights>
__device__ __forceinline__ void combine_both(const View& view, const CombineInput& in,
                                             const CombineOutput& out, uint64_t epoch) {
    constexpr OwnRows kOwn = OwnRows::kDirect;
    announce_combine(view, epoch);
    report_combine_reader(view, epoch);
    if (kWeights == Weights::kLate) push_weights(view, in, epoch);
    const int most = view.num_ranks > 1 ? most_received(view, in.routing) : 0;
    const CombineTokens tokens = combine_tokens(view, out);
    const int lag = view.by_parts(gridDim.x);
    Watch watch{view, Op::kCombine};
    int to_send = blockIdx.x;
    int to_recv = blockIdx.x;
    bool settled = blockIdx.x != 0 || !keeps_order();
#pragma unroll 1
    while (true) {
        const SendItem item = SendItem::of<kOwn>(view, to_send);
        const int token = view.by_parts(to_recv);
        const bool sends = item.slot < most;
        const bool receives = token < tokens.rows;
        if (sends && (!receives || item.slot <= token + lag)) {
            if (!send_item<kWeights>(view, in, watch, item, epoch)) break;
            to_send += gridDim.x;
        } else if (!settled) {
            if (!settle_combine(view, out.wait_ns, epoch)) break;
            settled = true;
        } else if (receives) {
            const int part = to_recv - token * view.parts;
            if (!recv_item<kInFlight, kOwn, kWeights>(view, in, out, watch, part, token,
                                                      tokens.valid, epoch)) {
                break;
            }
            to_recv += gridDim.x;
        } else {
            break;
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) note_combined(view, in.routing);
}

// The items of a CTA from its second on: where more came than was expected at launch.
template <OwnRows kOwn, Weights kWeights>
__device__ __noinline__ bool send_rest(const View& view, const CombineInput& in, int most,
                                       uint64_t epoch) {
    Watch watch{view, Op::kCombine};
#pragma unroll 1
    for (int i = blockIdx.x + gridDim.x;; i += gridDim.x) {
        const SendItem item = SendItem::of<kOwn>(view, i);
        if (item.slot >= most) return true;
        if (!send_item<kWeights>(view, in, watch, item, epoch)) return false;
    }
}

// Both halves where the grid has a CTA for every token, and for every message that was expected:
// nothing to go round for, so nothing to keep in registers on the way. All sends come first.
template <int kInFlight, Weights kWeights>
__device__ __forceinline__ void combine_once(const View& view, const CombineInput& in,
                                             const CombineOutput& out, uint64_t epoch) {
    constexpr OwnRows kOwn = OwnRows::kDirect;
    announce_combine(view, epoch);
    report_combine_reader(view, epoch);
    if (kWeights == Weights::kLate) push_weights(view, in, epoch);
    if (view.num_ranks > 1) {
        Watch watch{view, Op::kCombine};
        const SendItem item = SendItem::of<kOwn>(view, blockIdx.x);
        if (item.slot < view.max_tokens && !send_item<kWeights>(view, in, watch, item, epoch)) {
            return;
        }
        const int most = most_received(view, in.routing);
        const SendItem next = SendItem::of<kOwn>(view, blockIdx.x + gridDim.x);
        if (next.slot < most && !send_rest<kOwn, kWeights>(view, in, most, epoch)) return;
    }
    if (blockIdx.x == 0 && keeps_order() && !settle_combine(view, out.wait_ns, epoch)) return;
    const CombineTokens tokens = combine_tokens(view, out);
    const int token = view.by_parts(blockIdx.x);
    Watch watch{view, Op::kCombine};
    if (token < tokens.rows &&
        !recv_item<kInFlight, kOwn, kWeights>(view, in, out, watch,
                                              static_cast<int>(blockIdx.x) - token * view.parts,
                                              token, tokens.valid, epoch)) {
        return;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) note_combined(view, in.routing);
}

}  // namespace ep

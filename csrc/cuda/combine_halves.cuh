// The halves of combine, apart and as one, and how an operation comes to its end.
#pragma once

#include "cuda/begin.cuh"
#include "cuda/combine.cuh"

namespace ep {

__device__ __forceinline__ void note_combined(const View& view, const CombineInput& in,
                                              const Turn& turn) {
    if (turn.given_up()) return;
    uint64_t messages = 0;
#pragma unroll 1
    for (int s = 0; s < view.num_ranks; ++s) {
        if (!turn.absent.has(view, s)) messages += in.routing.received[s];
    }
    const int bytes = in.wire == Wire::kFp8 ? view.fp8_sum_bytes : 2 * view.hidden;
    add_statistic(view.stats->bytes_combined, messages * bytes);
}

// The warp of CTA 0 that keeps order: its last.
__device__ __forceinline__ bool keeps_order() { return threadIdx.x >= kCombineThreads - 32; }

__device__ __forceinline__ void report_combine_reader(const View& view, uint64_t epoch) {
    if (!keeps_order()) {
        ptx::arrive_with<kCombineThreads>(epoch);
        return;
    }
    ptx::await_arrivals<kCombineThreads>();
    if (threadIdx.x == kCombineThreads - 32) atomicAdd(&view.state->combine_readers, 1u);
}

// CTA 0's first warp tells every rank that this one has finished its last combine but one. That is
// what lets a peer use the inbox of this parity again: it waits for the same word of this epoch in
// its receive, and sends to that inbox only in the combine after the next.
// The word comes with the terms that all ranks must share.
__device__ __forceinline__ void announce_combine(const View& view, const CombineInput& in,
                                                 const Turn& turn) {
    if (threadIdx.x >= 32 || turn.given_up()) return;
    const int64_t line = view.ready_out + (turn.epoch & 1) * view.num_ranks * kLineBytes;
    const uint64_t terms =
        combine_terms(turn.absent.digest(view), in.wire, in.late_weights, *in.routing.dispatched);
#pragma unroll 1
    for (int r = threadIdx.x; r < view.num_ranks; r += 32) {
        if (turn.absent.has(view, r)) continue;
        ptx::store_line_vector(view.peer[r] + line, {terms, turn.epoch});
    }
}

// CTA 0's last warp: all ranks are in this combine, under the same terms, and all CTAs of this one
// know its epoch.
__device__ __noinline__ inline void settle_combine(const View& view, const CombineOutput& out,
                                                   Turn turn) {
    if (turn.given_up()) return;
    const uint64_t epoch = turn.epoch;
    const uint64_t terms = combine_terms(turn.absent.digest(view), out.wire, out.late_weights,
                                         *out.routing.dispatched);
    Watch watch{view, Op::kCombine};
    const bool have_read = all_have_read(view.state->combine_readers);
    const uint8_t* lines = view.ready_in + (epoch & 1) * view.num_ranks * kLineBytes;
    const uint64_t start = ptx::global_timer_ns();
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        const int r = base + static_cast<int>(threadIdx.x & 31);
        const bool asked = r < view.num_ranks && !turn.absent.has(view, r);
        const uint8_t* from = asked ? lines + r * kLineBytes : nullptr;
        ptx::Vector line{};
        uint64_t waited = 0;
        if (!await_tags(watch, from, r, epoch, start, line, waited)) return;
        const bool differs = asked && line.lo != terms;
        if (differs) fail(view, FaultCode::kTerms, Op::kCombine, r, terms, line.lo);
        if (__any_sync(kFullWarp, differs)) return;
        if (out.wait_ns != nullptr && asked) out.wait_ns[r] += waited;
    }
    advance(view.state->combined, view.state->combine_readers, epoch, have_read);
}

// CTA 0 keeps order; of the others, the first `send_ctas` send and the rest receive.
__device__ __forceinline__ Share share_after(int before) {
    return Share::of(static_cast<int>(blockIdx.x) - before, static_cast<int>(gridDim.x) - before);
}

// What the CTAs that send ask for before anything else: of the halves apart, and of both at once.
template <class Sums>
__device__ __forceinline__ FirstItem first_of_send(const View& view, const CombineInput& in) {
    FirstItem first{};
    if (blockIdx.x == 0) return first;
    const Share share = share_after(1);
    first.load<OwnRows::kThroughInbox>(view, in, share.units<Sums::kParts>());
    return first;
}
template <class Sums>
__device__ __forceinline__ FirstItem first_of_both(const View& view, const CombineInput& in,
                                                   int send_ctas) {
    FirstItem first{};
    const int index = static_cast<int>(blockIdx.x) - 1;
    // A rank alone sends to nobody.
    if (index < 0 || index >= send_ctas || view.num_ranks == 1) return first;
    const Share share = Share::of(index, send_ctas);
    first.load<OwnRows::kDirect>(view, in, share.units<Sums::kParts>());
    return first;
}

template <class Sums, Weights kWeights>
__device__ __forceinline__ void combine_send(const View& view, const CombineInput& in,
                                             const Turn& turn, const OwnTable<kWeights>& table,
                                             const FirstItem& first) {
    table.push(view, in, turn, true);
    if (blockIdx.x == 0) {
        announce_combine(view, in, turn);
        if (threadIdx.x == 0) note_combined(view, in, turn);
    } else {
        Sums::template send<OwnRows::kThroughInbox, kWeights>(view, in, turn, share_after(1),
                                                              first);
    }
}

template <class Sums>
__device__ __forceinline__ void combine_recv(const View& view, const CombineOutput& out,
                                             const Turn& turn) {
    report_combine_reader(view, turn.epoch);
    if (blockIdx.x != 0) {
        Sums::template receive<OwnRows::kThroughInbox, Weights::kKnown>(view, {}, out, turn,
                                                                        share_after(1));
    } else if (keeps_order()) {
        settle_combine(view, out, turn);
    }
}

// Both halves at once. Senders wait for nothing but weights, which are pushed before any wait.
template <class Sums, Weights kWeights>
__device__ __forceinline__ void combine_both(const View& view, const CombineInput& in,
                                             const CombineOutput& out, int send_ctas,
                                             const Turn& turn, const OwnTable<kWeights>& table,
                                             const FirstItem& first) {
    constexpr OwnRows kOwn = OwnRows::kDirect;
    const int index = static_cast<int>(blockIdx.x) - 1;
    table.push(view, in, turn, false);
    if (index < 0) {
        announce_combine(view, in, turn);
        report_combine_reader(view, turn.epoch);
        if (keeps_order()) settle_combine(view, out, turn);
        if (threadIdx.x == 0) note_combined(view, in, turn);
    } else if (index < send_ctas) {
        Sums::template send<kOwn, kWeights>(view, in, turn, Share::of(index, send_ctas), first);
        report_combine_reader(view, turn.epoch);
    } else {
        report_combine_reader(view, turn.epoch);
        Sums::template receive<kOwn, kWeights>(view, in, out, turn, share_after(1 + send_ctas));
    }
}

}  // namespace ep

// Bounded waiting and the fault record. What runs only when something is wrong stays out of line:
// the kernels are short enough to be fetched once, and every inlined copy would be fetched on the
// way.
//
// Nothing here traps: an operation that cannot finish records why, sets the abort word on itself
// and on its peers, and returns. Later operations report the word, send what nobody reads, and end
// every wait at its first check (begin.cuh says why they do not stop sooner).
#pragma once

#include "cuda/masks.cuh"
#include "cuda/ptx.cuh"
#include "cuda/view.h"

namespace ep {

inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ uint64_t* abort_word(const View& view, int r) {
    return reinterpret_cast<uint64_t*>(view.peer[r] + HeapLayout::kAbortOffset);
}

// Adds to a statistic without waiting for what it was.
__device__ __forceinline__ void add_statistic(uint64_t& total, uint64_t more) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&total), static_cast<unsigned long long>(more));
}

// The same for what only grows.
__device__ __forceinline__ void raise_to(uint64_t& counter, uint64_t value) {
    atomicMax(reinterpret_cast<unsigned long long*>(&counter),
              static_cast<unsigned long long>(value));
}

// A receive moves its chain's counter on, which is safe once every CTA of the kernel has read it:
// each says so, and one warp waits for all. It need not wait long: the CTAs are resident together,
// and this comes after the wait for peers. (An operation that gave up leaves its readers counted
// until reset(): hence "at least".)
//
// Every kernel that ends an operation reports so, in all CTAs: report_dispatch_reader and
// report_combine_reader. One warp of the CTA waits for the others and counts the CTA.

// One warp: have all CTAs read the epoch?
__device__ __forceinline__ bool all_have_read(uint32_t& readers) {
    const bool first = (threadIdx.x & 31) == 0;
    return !__any_sync(kFullWarp, first && atomicAdd(&readers, 0u) < gridDim.x);
}
// The same warp. `have_read`: an earlier look, so that another need not lie on the way.
__device__ __forceinline__ void advance(uint64_t& counter, uint32_t& readers, uint64_t epoch,
                                        bool have_read) {
    while (!have_read) have_read = all_have_read(readers);
    if ((threadIdx.x & 31) != 0) return;
    readers = 0;
    raise_to(counter, epoch);
}

// This rank leaves an operation of its chain unfinished, and no combine may follow it. (Normal
// operations have no chain; they ask may_run.)
__device__ __forceinline__ void end_chain(const View& view) {
    if (view.state != nullptr) raise_to(view.state->combined, ChainState::kEnded);
}

// The first fatal fault on this rank wins; the code is written last (the host reads it first).
__device__ __noinline__ inline void record_fault(const View& view, Fault fault) {
    if (atomicExch(view.fault_claim, 1u) != 0) return;
    const uint32_t code = fault.code;
    volatile Fault* out = &view.faults->fatal;
    out->op = fault.op;
    out->chain = fault.chain;
    out->rank = fault.rank;
    out->peer = fault.peer;
    out->count = fault.count;
    out->expected = fault.expected;
    out->seen = fault.seen;
    __threadfence_system();  // pairs with the host's acquire of `code`
    out->code = code;
}

// Not fatal: the entry is dropped, the host raises at its next check. The record holds the running
// total; whoever publishes it looks again, so that the last word is the largest.
__device__ __noinline__ inline void record_routing(const View& view, int dropped, int64_t expert,
                                                   Op op = Op::kDispatch) {
    volatile Fault* out = &view.faults->routing;
    out->op = static_cast<uint32_t>(op);
    out->chain = view.chain;
    out->rank = view.rank;
    out->peer = -1;
    out->expected = view.num_experts;
    out->seen = static_cast<uint64_t>(expert);
    atomicAdd(view.dropped_entries, static_cast<uint32_t>(dropped));
    uint32_t total = 0;
    do {
        total = atomicAdd(view.dropped_entries, 0u);
        out->count = total;
        __threadfence_system();
    } while (total != atomicAdd(view.dropped_entries, 0u));
    out->code = static_cast<uint32_t>(FaultCode::kRouting);
}

__device__ __noinline__ inline void abort_group(const View& view, FaultCode code, int peer) {
    const unsigned long long word = pack_abort(code, view.names.of(view.rank), view.names.of(peer));
    end_chain(view);
#pragma unroll 1
    for (int r = 0; r < view.num_ranks; ++r) {
        if (r != view.rank && is_masked(view, r)) continue;
        // The first cause stays, but for what a masked rank said, which stops nobody.
        auto* const there = reinterpret_cast<unsigned long long*>(abort_word(view, r));
        const unsigned long long first = atomicCAS_system(there, 0ull, word);
        const int by = abort_rank(first);
        if (by >= 0 && view.mask != nullptr && view.mask->has(by)) {
            atomicCAS_system(there, first, word);
        }
    }
}

__device__ __noinline__ inline void fail(const View& view, FaultCode code, Op op, int peer,
                                         uint64_t expected, uint64_t seen) {
    record_fault(view, Fault{.code = static_cast<uint32_t>(code),
                             .op = static_cast<uint32_t>(op),
                             .chain = view.chain,
                             .rank = view.names.of(view.rank),
                             .peer = view.names.of(peer),
                             .count = 0,
                             .expected = expected,
                             .seen = seen});
    abort_group(view, code, peer);
}

// Somebody else gave up: who, and on whom.
__device__ __noinline__ inline void record_abort(const View& view, Op op, uint64_t word) {
    end_chain(view);
    if (abort_rank(word) == view.names.of(view.rank)) return;
    record_fault(view, Fault{.code = static_cast<uint32_t>(FaultCode::kAborted),
                             .op = static_cast<uint32_t>(op),
                             .chain = view.chain,
                             .rank = abort_rank(word),
                             .peer = abort_peer(word),
                             .count = 0,
                             .expected = 0,
                             .seen = static_cast<uint64_t>(abort_code(word))});
}

// What this rank's abort word means: false if a rank gave up that is masked here. Its word is taken
// back, so that another may come.
__device__ __noinline__ inline bool heed_abort(const View& view, Op op, uint64_t word) {
    if (!is_masked(view, abort_rank(word))) {
        record_abort(view, op, word);
        return true;
    }
    atomicCAS_system(reinterpret_cast<unsigned long long*>(abort_word(view, view.rank)),
                     static_cast<unsigned long long>(word), 0ull);
    return false;
}

// One warp's patience: ends a wait that found the group aborted, a tag from the future, or no time
// left. All lanes call it together, with the tag each of them saw; `waiting` on the lanes that miss
// theirs.
struct Missing {
    bool waiting;
    int peer;
    uint64_t expected;
    uint64_t seen;
    const uint8_t* at;  // the vector with the tag

    __device__ __forceinline__ void note(int whose, uint64_t tag, const uint8_t* where) {
        peer = whose;
        seen = tag;
        at = where;
    }
};

// Returns the deadline of the wait (0 on the way in: not set yet), or 0: give up. Out of line,
// since it runs once in many polls; by value, so that nothing of the poll loop lives in memory.
__device__ __noinline__ inline uint64_t still_patient(const View& view, Op op, Missing missing,
                                                      uint64_t deadline) {
    const int lane = threadIdx.x & 31;
    const unsigned who = __ballot_sync(kFullWarp, missing.waiting);
    const int leader = who == 0 ? 0 : __ffs(who) - 1;
    const int peer = __shfl_sync(kFullWarp, missing.peer, leader);
    const uint64_t seen = __shfl_sync(kFullWarp, missing.seen, leader);
    const uint64_t now = __shfl_sync(kFullWarp, ptx::global_timer_ns(), 0);
    if (deadline == 0) deadline = now + *view.budget_ns;

    const bool future = seen > missing.expected;
    if (future || now > deadline) {
        if (lane == leader) {
            fail(view, future ? FaultCode::kDesync : FaultCode::kTimeout, op, peer,
                 missing.expected, seen);
        }
        return 0;
    }
    const uint64_t word =
        __shfl_sync(kFullWarp, ptx::load_relaxed_sys(abort_word(view, view.rank)), 0);
    if (word == 0) return deadline;
    const bool stops = __shfl_sync(kFullWarp, lane == 0 && heed_abort(view, op, word), 0);
    return stops ? 0 : deadline;
}

struct Watch {
    static constexpr uint32_t kPollsPerCheck = 256;

    const View& view;
    Op op;
    uint32_t polls = 0;
    uint64_t deadline = 0;

    // After a poll that found something missing. `tell`: what; asked once in many polls, since what
    // lies between two looks is time that a line waits.
    template <class Tell>
    __device__ __forceinline__ bool give_up(Tell tell) {
        if ((++polls & (kPollsPerCheck - 1)) != 0) return false;
        deadline = still_patient(view, op, tell(), deadline);
        return deadline == 0;
    }
    // Waits for one of the tags that are missing. Whole warps; false: gave up.
    __device__ __forceinline__ bool await_one(Missing missing) {
        const int leader = __ffs(__ballot_sync(kFullWarp, missing.waiting)) - 1;
        const bool leads = static_cast<int>(threadIdx.x & 31) == leader;
        missing.waiting = leads;
        while (true) {
            if (leads) missing.seen = ptx::load_line_vector(missing.at).hi;
            if (__any_sync(kFullWarp, leads && missing.seen == missing.expected)) return true;
            if (give_up([&] { return missing; })) return false;
        }
    }
};

}  // namespace ep

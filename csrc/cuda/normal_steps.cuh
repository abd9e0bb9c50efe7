// What normal kernels share: how they begin, wait for words of peers, and end; a warp's ring of
// shared-memory stages.
#pragma once

#include <cstddef>

#include "cuda/normal_group.h"
#include "cuda/watch.cuh"

namespace ep::normal {

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x & 31); }
__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x >> 5); }

// Whole CTAs. False: the group gave up before. A CTA that stops takes its ticket all the same.
__device__ __forceinline__ bool may_run(const Group& group, Op op) {
    uint64_t word = 0;
    if (threadIdx.x == 0) {
        word = ptx::load_relaxed_sys(abort_word(group.waits, group.rank()));
        if (word != 0 && blockIdx.x == 0) record_abort(group.waits, op, word);
    }
    return __syncthreads_or(word != 0) == 0;
}

// Waits until each lane's word holds the epoch, with any of these flags beside it, which `flags`
// then has; acquires what was written before it. A null pointer asks for nothing. Whole warps;
// false: gave up.
__device__ __forceinline__ bool await_words(Watch& watch, const uint64_t* word, int peer,
                                            uint64_t epoch, uint64_t& flags) {
    const uint64_t known = flags;
    while (true) {
        const uint64_t found = word == nullptr ? epoch : ptx::load_acquire_sys(word);
        const uint64_t seen = found & ~known;
        flags = found & known;
        const Missing missing{seen != epoch, peer, epoch, seen,
                              reinterpret_cast<const uint8_t*>(word)};
        if (!__any_sync(kFullWarp, missing.waiting)) break;
        if (watch.give_up([&] { return missing; })) return false;
    }
    __syncwarp();  // the other lanes see what each has acquired
    return true;
}

__device__ __forceinline__ bool await_words(Watch& watch, const uint64_t* word, int peer,
                                            uint64_t epoch) {
    uint64_t no_flags = 0;
    return await_words(watch, word, peer, epoch, no_flags);
}

// A peer's offset is where we write: never beyond its heap, and laid out as it expects. False:
// recorded.
__device__ __forceinline__ bool check_credit(const Group& group, Op op, int peer,
                                             const Credit& credit, int64_t bytes, uint64_t terms) {
    if (credit.terms != 0 && credit.terms != terms) {
        fail(group.waits, FaultCode::kTerms, op, peer, terms, credit.terms);
        return false;
    }
    const bool ok = credit.offset >= 0 && credit.offset % kLine == 0 && credit.rows >= 0 &&
                    credit.offset <= group.data_bytes && bytes >= 0 &&
                    bytes <= group.data_bytes - credit.offset;
    if (!ok) {
        fail(group.waits, FaultCode::kCount, op, peer, static_cast<uint64_t>(group.data_bytes),
             static_cast<uint64_t>(credit.offset + bytes));
    }
    return ok;
}

// Tells every rank where this rank's block or inbox lies, and that nothing of the epochs before is
// read there any more: kernels that have ended did so. One warp. A line, since a release would wait
// for the way to the peer and back before the epoch goes. Pairs with await_credits of that rank.
__device__ __forceinline__ void publish_credit(const Group& group, int64_t offset,
                                               const Credit& mine) {
    const int v = lane_of() & 7;
    const auto first = static_cast<uint64_t>(mine.offset), rows = static_cast<uint64_t>(mine.rows);
    const ptx::Vector vector{v == 0   ? first
                             : v == 1 ? mine.epoch
                                      : 0,
                             v == 0   ? rows
                             : v == 1 ? mine.terms
                                      : 0};
#pragma unroll 1
    for (int r = lane_of() >> 3; r < group.num_ranks(); r += 4) {
        auto* line = reinterpret_cast<uint8_t*>(group.credit(offset, r, group.rank()));
        ptx::store_line_vector(line + 16 * v, vector);
    }
}

// Waits for a credit, the same on both lanes of a pair; nullptr: for none. They load the epoch and
// what belongs to it at once, out of one sector, which comes whole. What is done with a credit are
// stores to where it points, so they come after it. Whole warps; false: gave up.
__device__ __forceinline__ bool await_credits(Watch& watch, const Credit* credit, int peer,
                                              uint64_t epoch, Credit& found) {
    static_assert(offsetof(Credit, rows) == 8 && offsetof(Credit, epoch) == 16);
    static_assert(offsetof(Credit, terms) == 24);
    const bool has_epoch = (lane_of() & 1) != 0;
    const uint8_t* half = reinterpret_cast<const uint8_t*>(credit) + (has_epoch ? 16 : 0);
    ptx::Vector v{0, 0};
    while (true) {
        if (credit != nullptr) v = ptx::load_line_vector(half);
        const Missing missing{has_epoch && credit != nullptr && v.lo != epoch, peer, epoch, v.lo,
                              half};
        if (!__any_sync(kFullWarp, missing.waiting)) break;
        if (watch.give_up([&] { return missing; })) return false;
    }
    found.offset = static_cast<int64_t>(__shfl_sync(kFullWarp, v.lo, lane_of() & ~1));
    found.rows = static_cast<int64_t>(__shfl_sync(kFullWarp, v.hi, lane_of() & ~1));
    found.terms = __shfl_sync(kFullWarp, v.hi, lane_of() | 1);
    return true;
}

// Every CTA of a kernel, at its end. True in the CTA that comes last, if no CTA gave up. It leaves
// the kernel's counters of work, which nobody takes from any more, at zero.
template <int kCounters>
__device__ __forceinline__ bool finish(const Group& group, Ticket which,
                                       const Ticket (&counters)[kCounters], bool gave_up) {
    constexpr uint32_t kGaveUp = 1u << 16;
    gave_up = __syncthreads_or(gave_up) != 0;
    bool last = false;
    if (threadIdx.x == 0) {
        uint32_t* ticket = &group.state->tickets[which];
        const uint32_t before = ptx::add_acq_rel_gpu(ticket, gave_up ? 1 + kGaveUp : 1);
        last = before % kGaveUp == gridDim.x - 1;
        if (last) {
            *ticket = 0;
#pragma unroll
            for (const Ticket counter : counters) group.state->tickets[counter] = 0;
        }
        last = last && !gave_up && before < kGaveUp;
    }
    return __syncthreads_or(last) != 0;
}

// Work that the warps of a kernel take as they go: not all SMs reach the link at the same speed. A
// warp's item i is on lane i % 32. The first is the warp's own, later ones come from the counter;
// each is asked for well before it is needed, by a take() of the caller's.
struct Claims {
    uint32_t* counter;
    int32_t shared;  // items that are some warp's own
    int32_t item;
    int32_t taken = 1;

    // Warp `warp` of `warps` in each CTA.
    static __device__ __forceinline__ Claims start(const Group& group, Ticket which, int warp,
                                                   int warps) {
        const auto ctas = static_cast<int32_t>(gridDim.x);
        return {&group.state->tickets[which], ctas * warps,
                static_cast<int32_t>(blockIdx.x) + warp * ctas};
    }
    __device__ __forceinline__ void take() {
        if (lane_of() == (taken & 31)) item = shared + static_cast<int>(atomicAdd(counter, 1u));
        ++taken;
    }
    // One of the last 32 that were taken. Whole warps.
    __device__ __forceinline__ int operator[](int i) const {
        return __shfl_sync(kFullWarp, item, i & 31);
    }
};

// Lane d's index of a token among those that go to rank d, or -1; ranks 32 and on in later rounds.
struct Positions {
    int32_t at[kRounds];

    __device__ __forceinline__ void load(const int32_t* send_position, int num_ranks, int64_t token,
                                         int num_tokens) {
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const int r = lane_of() + 32 * j;
            at[j] = token < num_tokens && r < num_ranks ? send_position[token * num_ranks + r] : -1;
        }
    }
};

// Stages behind bulk loads, of one warp. Piece i is in stage i % kStages; the load of piece
// i + kAhead starts while piece i is in use, when nobody uses the piece that had its stage before.
template <int kStages, int kAhead, int kBytes>
struct Ring {
    static constexpr int kBehind = kStages - kAhead;  // pieces that may still be in use

    uint8_t* stages;
    uint64_t* arrivals;  // [kStages]
    int32_t filling = 0;  // the stages that the next load and the next use are for
    int32_t next_used = 0;
    int32_t loads = 0;  // under way
    uint32_t parity = 0;

    static EP_HD constexpr int bytes(int warps) { return warps * kStages * (kBytes + 8); }
    // Of warp `warp` among `warps`; the arrival words lie behind all stages.
    static __device__ __forceinline__ Ring carve(uint8_t* smem, int warp, int warps) {
        auto* words = reinterpret_cast<uint64_t*>(smem + warps * kStages * kBytes);
        return {smem + warp * kStages * kBytes, words + warp * kStages};
    }
    // The warp that owns it.
    __device__ __forceinline__ void init() {
        if (lane_of() == 0) {
#pragma unroll
            for (int s = 0; s < kStages; ++s) ptx::init_arrivals(arrivals + s, 1);
        }
        ptx::fence_async();  // the copy engine sees the words
        __syncwarp();
    }
    __device__ __forceinline__ void load(const uint8_t* from, int num_bytes) {
        if (lane_of() == 0) {
            ptx::start_load(stages + filling * kBytes, from, static_cast<uint32_t>(num_bytes),
                            arrivals + filling);
        }
        filling = filling + 1 == kStages ? 0 : filling + 1;
        ++loads;
    }
    // The next piece, when it is there.
    __device__ __forceinline__ const uint8_t* await() {
        ptx::await_phase(arrivals + next_used, parity);
        const uint8_t* at = stages + next_used * kBytes;
        next_used = next_used + 1 == kStages ? 0 : next_used + 1;
        if (next_used == 0) parity ^= 1;
        --loads;
        return at;
    }
    // A CTA must not end before its loads.
    __device__ __forceinline__ void drain() {
        while (loads > 0) await();
    }
};

// Stages that a warp fills some steps ahead, each lane with the vectors that it will itself use: no
// lane waits for another. The next load comes before the next use, so that a stage is filled again
// only when its use is over.
template <int kStages, int kBytes>
struct CopyRing {
    static constexpr int kAhead = kStages - 1;
    static constexpr int kStep = 32 * 16;  // of a warp's vectors
    static_assert(kBytes == 4 * kStep, "as start_copies has it");

    uint8_t* stages;
    int32_t filling = 0;
    int32_t next_used = 0;
    uint32_t packed = 0;  // bit i: the i-th last load, of one part of a packed piece

    static EP_HD constexpr int bytes(int warps) { return warps * kStages * kBytes; }
    static __device__ __forceinline__ CopyRing carve(uint8_t* smem, int warp) {
        return {smem + warp * kStages * kBytes};
    }
    // Vectors of `from`; 0: nothing, but it counts as a load. kWhole: as many as a stage has, or 0.
    template <bool kWhole>
    __device__ __forceinline__ void load(const uint8_t* from, int num_vectors) {
        uint8_t* to = stages + filling * kBytes + 16 * lane_of();
        if (!kWhole) {
            ptx::start_copies(to, from + 16 * lane_of(), num_vectors - lane_of());
        } else if (num_vectors != 0) {
            ptx::start_four_copies(to, from + 16 * lane_of());
        }
        loaded();
        packed <<= 1;
    }
    // A packed part: every lane gets the header.
    __device__ __forceinline__ void load_packed(const uint8_t* body, const uint8_t* header) {
        ptx::start_packed_copies(stages + filling * kBytes + 16 * lane_of(), body + 16 * lane_of(),
                                 header);
        loaded();
        packed = packed << 1 | 1;
    }
    __device__ __forceinline__ void loaded() {
        ptx::commit_copies();
        filling = filling + 1 == kStages ? 0 : filling + 1;
    }
    // What await() gives next. Asked when the loads that come before it have started.
    __device__ __forceinline__ bool next_is_packed() const { return (packed >> kAhead & 1) != 0; }
    // What this lane loaded kAhead loads ago, its first vector.
    __device__ __forceinline__ const uint8_t* await() {
        ptx::await_copies<kAhead>();
        const uint8_t* at = stages + next_used * kBytes + 16 * lane_of();
        next_used = next_used + 1 == kStages ? 0 : next_used + 1;
        return at;
    }
};

}  // namespace ep::normal

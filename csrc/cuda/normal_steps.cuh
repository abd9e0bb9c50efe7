// What normal kernels share: how they begin, wait for words of peers, and end; a warp's ring of
// shared-memory stages.
#pragma once

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

// Waits until each lane's word holds the epoch; acquires what was written before it. A null pointer
// asks for nothing. Whole warps; false: gave up.
__device__ __forceinline__ bool await_words(Watch& watch, const uint64_t* word, int peer,
                                            uint64_t epoch) {
    while (true) {
        const uint64_t seen = word == nullptr ? epoch : ptx::load_acquire_sys(word);
        const Missing missing{seen != epoch, peer, epoch, seen,
                              reinterpret_cast<const uint8_t*>(word)};
        if (!__any_sync(kFullWarp, missing.waiting)) break;
        if (watch.give_up(missing)) return false;
    }
    __syncwarp();  // the other lanes see what each has acquired
    return true;
}

// A peer's offset is where we write: never beyond its heap. False: recorded.
__device__ __forceinline__ bool check_credit(const Group& group, Op op, int peer,
                                             const Credit& credit, int64_t bytes) {
    const bool ok = credit.offset >= 0 && credit.rows >= 0 && credit.offset <= group.data_bytes &&
                    bytes >= 0 && bytes <= group.data_bytes - credit.offset;
    if (!ok) {
        fail(group.waits, FaultCode::kCount, op, peer, static_cast<uint64_t>(group.data_bytes),
             static_cast<uint64_t>(credit.offset + bytes));
    }
    return ok;
}

// Tells every rank where this rank's block or inbox lies, and that nothing of the epochs before is
// read there any more. Acquired by that rank's await_words.
__device__ __forceinline__ void publish_credit(const Group& group, int64_t offset,
                                               const Credit& mine) {
#pragma unroll 1
    for (int r = threadIdx.x; r < group.num_ranks(); r += 32) {
        Credit* line = group.credit(offset, r, group.rank());
        line->offset = mine.offset;
        line->rows = mine.rows;
        ptx::store_release_sys(&line->epoch, mine.epoch);
    }
}

// Every CTA of a kernel, at its end. True in the CTA that comes last, if no CTA gave up: what all
// of them wrote is visible to it, and to whoever acquires what it releases.
__device__ __forceinline__ bool finish(const Group& group, Ticket which, bool gave_up) {
    constexpr uint32_t kGaveUp = 1u << 16;
    gave_up = __syncthreads_or(gave_up) != 0;
    bool last = false;
    if (threadIdx.x == 0) {
        uint32_t* ticket = &group.state->tickets[which];
        __threadfence_system();  // the CTA's stores to peers are covered as well
        const uint32_t before = ptx::add_acq_rel_gpu(ticket, gave_up ? 1 + kGaveUp : 1);
        last = before % kGaveUp == gridDim.x - 1;
        if (last) *ticket = 0;
        last = last && !gave_up && before < kGaveUp;
    }
    return __syncthreads_or(last) != 0;
}

// Stages between bulk loads and bulk stores, of one warp. Piece i is in stage i % kStages; the load
// of piece i + kAhead starts while piece i is in use, when the stores of the piece that had its
// stage before have left.
template <int kStages, int kAhead>
struct Ring {
    static constexpr int kBehind = kStages - kAhead;  // pieces whose stores may be in flight

    uint8_t* stages;
    uint64_t* arrivals;  // [kStages]
    int32_t filling = 0;  // the stages that the next load and the next use are for
    int32_t next_used = 0;
    int32_t loads = 0;  // under way
    uint32_t parity = 0;

    static EP_HD constexpr int bytes(int warps) { return warps * kStages * (kStageBytes + 8); }
    // Of warp `warp` among `warps`; the arrival words lie behind all stages.
    static __device__ __forceinline__ Ring carve(uint8_t* smem, int warp, int warps) {
        auto* words = reinterpret_cast<uint64_t*>(smem + warps * kStages * kStageBytes);
        return {smem + warp * kStages * kStageBytes, words + warp * kStages};
    }
    // The warp that owns it.
    __device__ __forceinline__ void init() {
        if (lane_of() == 0) {
#pragma unroll
            for (int s = 0; s < kStages; ++s) ptx::init_arrival(arrivals + s);
        }
        // The copy engine sees the words; and peers' credits, acquired before, come before stores.
        ptx::fence_async();
        __syncwarp();
    }
    __device__ __forceinline__ void load(const uint8_t* from, int num_bytes) {
        if (lane_of() == 0) {
            ptx::start_load(stages + filling * kStageBytes, from, static_cast<uint32_t>(num_bytes),
                            arrivals + filling);
        }
        filling = filling + 1 == kStages ? 0 : filling + 1;
        ++loads;
    }
    // The next piece, when it is there.
    __device__ __forceinline__ const uint8_t* await() {
        ptx::await_load(arrivals + next_used, parity);
        const uint8_t* at = stages + next_used * kStageBytes;
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

}  // namespace ep::normal

// Combine, the announcing warp: tells the sources which chunks of rows have arrived.
#pragma once

#include "cuda/normal_steps.cuh"

namespace ep::normal {

// What a sending warp has sent, for the announcing warp: a release waits until everything that the
// SM has stored has arrived, which takes microseconds; a warp that sends must not wait that long.
struct Outbox {
    static constexpr uint32_t kSlots = 16;
    static constexpr uint32_t kClosed = 1u << 31;

    uintptr_t
        word[kSlots];  // of chunk i: i % kSlots; where it is, and 1 more if it has packed rows
    uint32_t sent;  // chunks that have arrived; kClosed: there will be no more
    uint32_t told;  // chunks whose words are set

    // One lane of the sending warp. Waits, which is rare, for a free slot; the announcing warp,
    // which frees it, waits for nobody.
    __device__ __forceinline__ void add(uintptr_t chunk, uint32_t index) {
        while (index - ptx::load_acquire_cta(&told) >= kSlots) ptx::pause();
        word[index % kSlots] = chunk;
        ptx::store_release_cta(&sent, index + 1);  // acquired by announce()
    }
};

// One lane's: chunks whose stores are on their way, by the piece that ended them.
template <int kLag>
struct Underway {
    uintptr_t word[kLag] = {};
    uint32_t arrived = 0;

    // Of the piece that was sent last.
    __device__ __forceinline__ void add(uint64_t* chunk, bool packed) {
        word[kLag - 1] = reinterpret_cast<uintptr_t>(chunk) + (packed ? 1 : 0);
    }
    // When all pieces but the last kLag - 1 have arrived.
    __device__ __forceinline__ void pass_oldest(Outbox& outbox) {
        if (word[0] != 0) outbox.add(word[0], arrived++);
#pragma unroll
        for (int i = 0; i + 1 < kLag; ++i) word[i] = word[i + 1];
        word[kLag - 1] = 0;
    }
};

// The announcing warp, a lane a sending warp: tells the sources what has arrived, with one release
// for all that has by then.
__device__ __forceinline__ void announce(Outbox* outboxes, int senders, uint64_t epoch) {
    const bool mine = lane_of() < senders;
    Outbox& outbox = outboxes[mine ? lane_of() : 0];
    uint32_t told = 0;
    bool open = mine;
#pragma unroll 1
    while (__any_sync(kFullWarp, open)) {
        const uint32_t sent = mine ? ptx::load_acquire_cta(&outbox.sent) : 0;
        const uint32_t count = sent & ~Outbox::kClosed;
        open = mine && (sent & Outbox::kClosed) == 0;
        if (!__any_sync(kFullWarp, count != told)) continue;
        ptx::fence_release_sys();
        for (; told != count; ++told) {
            const uintptr_t word = outbox.word[told % Outbox::kSlots];
            ptx::store_relaxed_sys(reinterpret_cast<uint64_t*>(word & ~uintptr_t{1}),
                                   chunk_word(epoch, (word & 1) != 0));  // see Places::find
        }
        if (mine) ptx::store_release_cta(&outbox.told, told);  // the slots are free
    }
}

}  // namespace ep::normal

// Moving messages as tagged lines (csrc/ep/layout.h): 15 granules of 8 bytes and a tag.
//
// Vector v of a slot is lane (v % 8) of line (v / 8); lane 7's second half is the tag.
#pragma once

#include "cuda/watch.cuh"

namespace ep {

inline constexpr int kVectorsPerLine = 8;
inline constexpr int kGranulesPerLine = 15;

__device__ __forceinline__ bool holds_tag(int vector) { return (vector & 7) == 7; }
__device__ __forceinline__ int first_granule(int vector) {
    return (vector >> 3) * kGranulesPerLine + (vector & 7) * 2;
}

// Loads U vectors a lane until every tag among them is `tag`. A null pointer asks for nothing.
// `peers[u]` is who should have sent it. Whole warps call it; false: gave up.
template <int U>
__device__ __forceinline__ bool await_vectors(Watch& watch, const uint8_t* const (&from)[U],
                                              const int (&peers)[U], bool tag_lane, uint64_t tag,
                                              ptx::Vector (&v)[U]) {
    while (true) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (from[u] != nullptr) v[u] = ptx::load_line_vector(from[u]);
        }
        Missing missing{false, -1, tag, 0};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (tag_lane && from[u] != nullptr && v[u].hi != tag) {
                missing.waiting = true;
                missing.peer = peers[u];
                missing.seen = v[u].hi;
            }
        }
        if (!__any_sync(kFullWarp, missing.waiting)) return true;
        if (watch.give_up(missing)) return false;
    }
}

// Cuts a message in shared memory into lines and stores it to one slot; all threads of the CTA.
// The buffer is readable up to lines * 120 bytes. Pairs with await_vectors at the receiver.
template <int kThreads>
__device__ __forceinline__ void push_message(uint8_t* slot, const uint64_t* granules, int lines,
                                             uint64_t tag) {
    for (int v = threadIdx.x; v < lines * kVectorsPerLine; v += kThreads) {
        const int g = first_granule(v);
        ptx::store_line_vector(slot + 16 * v, {granules[g], holds_tag(v) ? tag : granules[g + 1]});
    }
}

// The reverse: waits for a whole message and lays it out flat in shared memory. Every thread calls
// it; false on the warps that gave up. The caller synchronises.
template <int kThreads, int U>
__device__ __forceinline__ bool pull_message(Watch& watch, const uint8_t* slot, uint64_t* granules,
                                             int lines, int peer, uint64_t tag) {
    const int num_vectors = lines * kVectorsPerLine;
    for (int base = 0; base < num_vectors; base += U * kThreads) {
        const uint8_t* from[U];
        int peers[U];
        ptx::Vector v[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads + threadIdx.x;
            from[u] = i < num_vectors ? slot + 16 * i : nullptr;
            peers[u] = peer;
        }
        if (!await_vectors<U>(watch, from, peers, holds_tag(threadIdx.x), tag, v)) return false;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (from[u] == nullptr) continue;
            const int i = base + u * kThreads + threadIdx.x;
            const int g = first_granule(i);
            granules[g] = v[u].lo;
            if (!holds_tag(i)) granules[g + 1] = v[u].hi;
        }
    }
    return true;
}

}  // namespace ep

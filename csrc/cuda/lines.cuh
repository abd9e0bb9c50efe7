// Moving messages as tagged lines (csrc/ep/layout.h): 15 granules of 8 bytes and a tag.
//
// Vector v of a slot is lane (v % 8) of line (v / 8); lane 7's second half is the tag.
#pragma once

#include "cuda/watch.cuh"

namespace ep {

__device__ __forceinline__ bool holds_tag(int vector) { return (vector & 7) == 7; }
__device__ __forceinline__ int first_granule(int vector) {
    return (vector >> 3) * kGranulesPerLine + (vector & 7) * 2;
}

// Polling whole messages from many CTAs would crowd out the messages themselves. Past this many
// CTAs a warp that misses something watches one tag until it turns up, and only then looks at the
// rest again.
inline constexpr unsigned kFewCtas = 48;

// After a look that found something missing. Whole warps; false: gave up.
__device__ __forceinline__ bool wait_for_more(Watch& watch, const Missing& missing) {
    if (gridDim.x <= kFewCtas) return !watch.give_up(missing);
    const int leader = __ffs(__ballot_sync(kFullWarp, missing.waiting)) - 1;
    const bool leads = static_cast<int>(threadIdx.x & 31) == leader;
    Missing one = missing;
    one.waiting = leads;
    while (true) {
        if (leads) one.seen = ptx::load_line_vector(one.at).hi;
        if (__any_sync(kFullWarp, leads && one.seen == one.expected)) return true;
        if (watch.give_up(one)) return false;
    }
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
        Missing missing{false, -1, tag, 0, nullptr};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (tag_lane && from[u] != nullptr && v[u].hi != tag) {
                missing.waiting = true;
                missing.peer = peers[u];
                missing.seen = v[u].hi;
                missing.at = from[u];
            }
        }
        if (!__any_sync(kFullWarp, missing.waiting)) return true;
        if (!wait_for_more(watch, missing)) return false;
    }
}

}  // namespace ep

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

// After a look that found something missing, which `tell` describes. `few`: so few look that they
// may look at everything again. Whole warps; false: gave up.
template <class Tell>
__device__ __forceinline__ bool wait_for_more(Watch& watch, Tell tell,
                                              bool few = gridDim.x <= kFewCtas) {
    return few ? !watch.give_up(tell) : watch.await_one(tell());
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
        const auto lacks = [&](int u) { return tag_lane && from[u] != nullptr && v[u].hi != tag; };
        bool waiting = false;
#pragma unroll
        for (int u = 0; u < U; ++u) waiting |= lacks(u);
        if (!__any_sync(kFullWarp, waiting)) return true;
        const auto tell = [&] {
            Missing missing{waiting, -1, tag, 0, nullptr};
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (lacks(u)) missing.note(peers[u], v[u].hi, from[u]);
            }
            return missing;
        };
        if (!wait_for_more(watch, tell)) return false;
    }
}

// A warp: waits for vectors with tags, one a lane, each of another rank, until their tags are
// `epoch`; nullptr: for none. Returns in each lane when its own came, after `start`. False: gave
// up.
__device__ __forceinline__ bool await_tags(Watch& watch, const uint8_t* from, int peer,
                                           uint64_t epoch, uint64_t start, ptx::Vector& line,
                                           uint64_t& waited) {
    Missing missing{from != nullptr, peer, epoch, 0, from};
    while (true) {
        if (missing.waiting) {
            line = ptx::load_line_vector(from);
            missing.seen = line.hi;
            missing.waiting = line.hi != epoch;
            waited = ptx::global_timer_ns() - start;
        }
        if (!__any_sync(kFullWarp, missing.waiting)) return true;
        if (watch.give_up([&] { return missing; })) return false;
    }
}

}  // namespace ep

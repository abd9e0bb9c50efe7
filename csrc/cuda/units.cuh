// Units of a row on their way (csrc/ep/layout.h): one warp stores one, and one warp loads it.
//
// Vector j of lane i is vector i % 8 of line 4 * j + i / 8. The first lines hold data; lane 7 of
// each has the tag where its last granule would be, and these granules travel in the line behind
// them. A unit is its own signal, line by line: nothing is fenced, flagged or counted.
#pragma once

#include "cuda/lines.cuh"

namespace ep {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

// The work of one warp: items first, first + step, ... Items next to each other go to different
// CTAs, so that little work is spread over many SMs.
struct Share {
    int first;
    int step;

    // Of this warp, in CTA `index` of the `ctas` that share the work.
    static __device__ __forceinline__ Share of(int index, int ctas) {
        return {index + warp_id() * ctas, ctas * (kCombineThreads / 32)};
    }
};

__device__ __forceinline__ int line_of(int vector) { return 4 * vector + (lane_id() >> 3); }
// Of a lane's vector among the data bytes of a unit.
__device__ __forceinline__ int unit_byte(int vector) {
    return line_of(vector) * kLineBytes + 16 * (lane_id() & 7);
}
// Whose displaced granule lane i of the last line carries: lane 7 of line i % 4 of some vector.
__device__ __forceinline__ int displacing_lane() { return 8 * (lane_id() & 3) + 7; }

// A unit of an FP8 row: two vectors a lane. Line 7, lanes 24 to 31 of the second vector, holds
// the displaced granules and, beside each, the scale of its line.
struct RowUnit {
    static constexpr int kVectors = 2;
    ptx::Vector v[kVectors];

    static __device__ __forceinline__ bool is_last_line(int vector) {
        return vector == 1 && lane_id() >= 24;
    }
    // Where a vector lies in the message.
    static __device__ __forceinline__ int byte_of(int vector, int) { return unit_byte(vector); }
    // Of a unit with so many lines of data.
    static __device__ __forceinline__ bool holds(int vector, int data_lines) {
        return line_of(vector) < data_lines || is_last_line(vector);
    }

    // From the row's bytes (zero in the last line) and the scale of each vector's line.
    __device__ __forceinline__ void pack(const uint32_t (&scale)[kVectors], uint64_t epoch) {
        const int from = displacing_lane();
        const bool first = (lane_id() & 7) < 4;
        const uint64_t lo0 = __shfl_sync(kFullWarp, v[0].hi, from);
        const uint64_t lo1 = __shfl_sync(kFullWarp, v[1].hi, from);
        const uint32_t scale0 = __shfl_sync(kFullWarp, scale[0], from);
        const uint32_t scale1 = __shfl_sync(kFullWarp, scale[1], from);
        if (is_last_line(1)) v[1] = {first ? lo0 : lo1, first ? scale0 : scale1};
        if (holds_tag(lane_id())) v[0].hi = v[1].hi = epoch;
    }
    // Back to the row's bytes; the last line's lanes keep their scale, in `hi`.
    __device__ __forceinline__ void unpack() {
        const uint64_t hi0 = __shfl_sync(kFullWarp, v[1].lo, 24 + (lane_id() >> 3));
        const uint64_t hi1 = __shfl_sync(kFullWarp, v[1].lo, 28 + (lane_id() >> 3));
        if (!holds_tag(lane_id())) return;
        v[0].hi = hi0;
        if (!is_last_line(1)) v[1].hi = hi1;
    }
    // The scale of each vector's line, packed or unpacked.
    __device__ __forceinline__ uint32_t scale_of(int vector) const {
        return __shfl_sync(kFullWarp, static_cast<uint32_t>(v[1].hi), 24 + (line_of(vector) & 7));
    }
    __device__ __forceinline__ void store(uint8_t* to, int data_lines) const {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            if (holds(j, data_lines)) ptx::store_line_vector(to + byte_of(j, data_lines), v[j]);
        }
    }
    // Lines that the unit lacks look as if they were there.
    __device__ __forceinline__ void look(const uint8_t* from, int data_lines, uint64_t epoch) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            v[j] = {0, epoch};
            if (holds(j, data_lines)) v[j] = ptx::load_line_vector(from + byte_of(j, data_lines));
        }
    }
};

// A unit of a combined row: four vectors a lane, the fourth with two lines of data. The line behind
// the data, lanes 16 to 23 of the fourth vector, holds the displaced granules: those of the first
// two vectors in `lo`, those of the others in `hi`.
struct SumUnit {
    static constexpr int kVectors = 4;
    ptx::Vector v[kVectors];

    static __device__ __forceinline__ bool is_last_line(int vector) {
        return vector == 3 && (lane_id() >> 3) == 2;
    }
    static __device__ __forceinline__ bool has_data(int vector, int data_lines) {
        return line_of(vector) < data_lines;
    }
    // Where a vector lies in the message; the last line follows the data at once.
    static __device__ __forceinline__ int byte_of(int vector, int data_lines) {
        if (!is_last_line(vector)) return unit_byte(vector);
        return data_lines * kLineBytes + 16 * (lane_id() & 7);
    }
    static __device__ __forceinline__ bool holds(int vector, int data_lines) {
        return has_data(vector, data_lines) || is_last_line(vector);
    }

    __device__ __forceinline__ void pack(uint64_t epoch) {
        const int from = displacing_lane();
        const bool first = (lane_id() & 7) < 4;
        uint64_t hi[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) hi[j] = __shfl_sync(kFullWarp, v[j].hi, from);
        if (is_last_line(3)) v[3] = {first ? hi[0] : hi[1], first ? hi[2] : hi[3]};
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            if (holds_tag(lane_id())) v[j].hi = epoch;
        }
    }
    __device__ __forceinline__ void unpack() {
        const int from = 16 + (lane_id() >> 3);
        const uint64_t hi0 = __shfl_sync(kFullWarp, v[3].lo, from);
        const uint64_t hi1 = __shfl_sync(kFullWarp, v[3].lo, from + 4);
        const uint64_t hi2 = __shfl_sync(kFullWarp, v[3].hi, from);
        const uint64_t hi3 = __shfl_sync(kFullWarp, v[3].hi, from + 4);
        if (!holds_tag(lane_id())) return;
        v[0].hi = hi0;
        v[1].hi = hi1;
        v[2].hi = hi2;
        if (!is_last_line(3)) v[3].hi = hi3;
    }
    // Lines that the unit lacks look as if they were there.
    __device__ __forceinline__ void look(const uint8_t* from, int data_lines, uint64_t epoch) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            v[j] = {0, epoch};
            if (holds(j, data_lines)) {
                v[j] = ptx::load_line_vector(from + byte_of(j, data_lines));
            }
        }
    }
    __device__ __forceinline__ void store(uint8_t* to, int data_lines) const {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            if (holds(j, data_lines)) {
                ptx::store_line_vector(to + byte_of(j, data_lines), v[j]);
            }
        }
    }
};

// Waits for a unit of a row or of a sum. Whole warps; false: gave up.
template <class Unit>
__device__ __forceinline__ bool await_unit(Watch& watch, const uint8_t* from, int peer, int lines,
                                           uint64_t epoch, Unit& unit) {
    while (true) {
        unit.look(from, lines, epoch);
        Missing missing{false, peer, epoch, 0, nullptr};
#pragma unroll
        for (int j = 0; j < Unit::kVectors; ++j) {
            if (!holds_tag(lane_id()) || unit.v[j].hi == epoch) continue;
            missing.waiting = true;
            missing.seen = unit.v[j].hi;
            missing.at = from + Unit::byte_of(j, lines);
        }
        if (!__any_sync(kFullWarp, missing.waiting)) return true;
        if (!wait_for_more(watch, missing)) return false;
    }
}

}  // namespace ep

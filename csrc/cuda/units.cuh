// Units of a row on their way (csrc/ep/layout.h): one warp stores one, and one warp loads it. Where
// there are few, two warps do, half each; on the way units are the same, so either side may choose.
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
    // The units whose parts these items are. A warp's parts are all the same one: its step is a
    // multiple of the parts.
    template <int kParts>
    __device__ __forceinline__ Share units() const {
        static_assert(kCombineThreads / 32 % kParts == 0);
        return {first / kParts, step / kParts};
    }
    template <int kParts>
    __device__ __forceinline__ int part() const {
        return first & (kParts - 1);
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
    static __device__ __forceinline__ bool sends(int vector, int data_lines) {
        return holds(vector, data_lines);
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
};

// A unit of a combined row: four vectors a lane, the fourth with two lines of data. The line behind
// the data, lanes 16 to 23 of the fourth vector, holds the displaced granules: those of the first
// two vectors in `lo`, those of the others in `hi`.
struct SumUnit {
    static constexpr int kVectors = 4;
    static constexpr int kParts = 1;
    static constexpr int kRowsAtOnce = 2;  // in flight: for more there are no registers
    ptx::Vector v[kVectors];

    static __device__ __forceinline__ ptx::Vector load_row(const uint8_t* from) {
        return *reinterpret_cast<const ptx::Vector*>(from);
    }

    // What it is of a row: lines of data.
    using Extent = int;
    static __device__ __forceinline__ Extent extent(int data_lines, int) { return data_lines; }

    static __device__ __forceinline__ bool is_last_line(int vector) {
        return vector == 3 && (lane_id() >> 3) == 2;
    }
    static __device__ __forceinline__ bool has_data(int vector, int data_lines) {
        return line_of(vector) < data_lines;
    }
    // Which vectors are added up, and where among the unit's bytes of a row they lie.
    static __device__ __forceinline__ bool adds(int vector, int data_lines) {
        return has_data(vector, data_lines);
    }
    static __device__ __forceinline__ int row_byte(int vector, int) { return unit_byte(vector); }
    // Where a vector lies in the message; the last line follows the data at once.
    static __device__ __forceinline__ int byte_of(int vector, int data_lines) {
        if (!is_last_line(vector)) return unit_byte(vector);
        return data_lines * kLineBytes + 16 * (lane_id() & 7);
    }
    static __device__ __forceinline__ bool holds(int vector, int data_lines) {
        return has_data(vector, data_lines) || is_last_line(vector);
    }
    static __device__ __forceinline__ bool sends(int vector, int data_lines) {
        return holds(vector, data_lines);
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
    __device__ __forceinline__ void unpack(int) {
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
};

// The same where there are so many that rows and inbox do not fit into L2 together: what was added
// up makes room.
struct StreamedUnit : SumUnit {
    static __device__ __forceinline__ ptx::Vector load_row(const uint8_t* from) {
        return ptx::load_vector_once(from);
    }
};

// Half a unit of a combined row, for one of two warps: its first seven lines of data or the others,
// two vectors a lane. Lanes 24 to 31 of the second vector have no such line. In a row they take the
// last vectors of the unit's first eight lines, whichever the half: so the second half's warp adds
// up every granule that a tag displaces and sends the line of them, and the two need not meet. In
// a message they take that line.
struct HalfUnit {
    static constexpr int kVectors = 2;
    static constexpr int kParts = 2;
    static constexpr int kRowsAtOnce = 8;
    ptx::Vector v[kVectors];

    static __device__ __forceinline__ ptx::Vector load_row(const uint8_t* from) {
        return SumUnit::load_row(from);
    }

    struct Extent {
        int first;  // line
        int data_lines;  // of the unit
        __device__ __forceinline__ int line(int vector) const { return first + line_of(vector); }
    };
    static __device__ __forceinline__ Extent extent(int data_lines, int half) {
        return {half * kLines, data_lines};
    }

    static __device__ __forceinline__ bool is_last_line(int vector) {
        return vector == 1 && lane_id() >= 24;
    }
    static __device__ __forceinline__ bool has_data(int vector, Extent e) {
        return !is_last_line(vector) && e.line(vector) < e.data_lines;
    }
    static __device__ __forceinline__ bool adds(int vector, Extent e) {
        return (is_last_line(vector) ? lane_id() & 7 : e.line(vector)) < e.data_lines;
    }
    static __device__ __forceinline__ int row_byte(int vector, Extent e) {
        if (!is_last_line(vector)) return e.first * kLineBytes + unit_byte(vector);
        return (lane_id() & 7) * kLineBytes + kLastVector;
    }
    static __device__ __forceinline__ int byte_of(int vector, Extent e) {
        if (!is_last_line(vector)) return e.first * kLineBytes + unit_byte(vector);
        return e.data_lines * kLineBytes + 16 * (lane_id() & 7);
    }
    static __device__ __forceinline__ bool holds(int vector, Extent e) {
        return has_data(vector, e) || is_last_line(vector);
    }
    static __device__ __forceinline__ bool sends(int vector, Extent e) {
        return has_data(vector, e) || (is_last_line(vector) && e.first != 0);
    }

    // Lane i of the last line carries the granules of lines i, which it has, and 8 + i.
    __device__ __forceinline__ void pack(uint64_t epoch) {
        const int from = 8 * ((lane_id() + 1) & 3) + 7;
        const uint64_t hi0 = __shfl_sync(kFullWarp, v[0].hi, from);
        const uint64_t hi1 = __shfl_sync(kFullWarp, v[1].hi, from);
        if (is_last_line(1)) v[1] = {v[1].hi, (lane_id() & 7) < 3 ? hi0 : hi1};
        if (holds_tag(lane_id())) v[0].hi = v[1].hi = epoch;
    }
    __device__ __forceinline__ void unpack(Extent e) {
        uint64_t hi[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            const int line = e.line(j);
            const uint64_t low = __shfl_sync(kFullWarp, v[1].lo, 24 + (line & 7));
            const uint64_t high = __shfl_sync(kFullWarp, v[1].hi, 24 + (line & 7));
            hi[j] = line < 8 ? low : high;
        }
        if (!holds_tag(lane_id())) return;
        v[0].hi = hi[0];
        if (!is_last_line(1)) v[1].hi = hi[1];
    }

  private:
    static constexpr int kLines = kSumDataLines / kParts;
    static constexpr int kLastVector = kLineBytes - 16;
};

// What a warp has of a unit, on its way.
template <class Unit, class Extent>
__device__ __forceinline__ void store_unit(const Unit& unit, uint8_t* to, Extent extent) {
#pragma unroll
    for (int j = 0; j < Unit::kVectors; ++j) {
        if (!Unit::sends(j, extent)) continue;
        ptx::store_line_vector(to + Unit::byte_of(j, extent), unit.v[j]);
    }
}
// Lines that the unit lacks look as if they were there.
template <class Unit, class Extent>
__device__ __forceinline__ void look(const uint8_t* from, Extent extent, uint64_t epoch,
                                     Unit& unit) {
#pragma unroll
    for (int j = 0; j < Unit::kVectors; ++j) {
        unit.v[j] = {0, epoch};
        if (!Unit::holds(j, extent)) continue;
        unit.v[j] = ptx::load_line_vector(from + Unit::byte_of(j, extent));
    }
}

// Waits for a unit of a row or of a sum. Whole warps; false: gave up.
template <class Unit, class Extent>
__device__ __forceinline__ bool await_unit(Watch& watch, const uint8_t* from, int peer,
                                           Extent extent, uint64_t epoch, Unit& unit) {
    while (true) {
        look(from, extent, epoch, unit);
        const auto lacks = [&](int j) { return holds_tag(lane_id()) && unit.v[j].hi != epoch; };
        bool waiting = false;
#pragma unroll
        for (int j = 0; j < Unit::kVectors; ++j) waiting |= lacks(j);
        if (!__any_sync(kFullWarp, waiting)) return true;
        const auto tell = [&] {
            Missing missing{waiting, peer, epoch, 0, nullptr};
#pragma unroll
            for (int j = 0; j < Unit::kVectors; ++j) {
                if (lacks(j)) missing.note(peer, unit.v[j].hi, from + Unit::byte_of(j, extent));
            }
            return missing;
        };
        if (!wait_for_more(watch, tell)) return false;
    }
}

}  // namespace ep

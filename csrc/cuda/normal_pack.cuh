// Combine: BF16 rows in three quarters of their bytes, exactly (PackedPiece in ep/normal.h). One
// warp packs or unpacks a part of 1024 channels, 32 to a lane.
#pragma once

#include "cuda/ptx.cuh"
#include "ep/normal.h"

namespace ep::normal {

// Four vectors of a lane: of each step the lane's eight channels.
struct LanePart {
    static constexpr int kSteps = PackedPiece::kSteps;
    ptx::Vector v[kSteps];

    // `raw`: from this lane's first vector on; the others are 512 bytes apart.
    static __device__ __forceinline__ LanePart load(const uint8_t* raw) {
        LanePart part;
#pragma unroll
        for (int u = 0; u < kSteps; ++u) {
            part.v[u] = *reinterpret_cast<const ptx::Vector*>(raw + u * PackedPiece::kStepBytes);
        }
        return part;
    }
    __device__ __forceinline__ void store(uint8_t* raw) const {
#pragma unroll
        for (int u = 0; u < kSteps; ++u) {
            *reinterpret_cast<ptx::Vector*>(raw + u * PackedPiece::kStepBytes) = v[u];
        }
    }
};

// Channels two to a word, as they lie in a row. Exponents at bits 7 and 23.
struct Words {
    static constexpr uint32_t kExponents = 0x7f807f80;
    static constexpr uint32_t kOne = 0x00800080;  // of both exponents
    uint32_t w[4];

    static __device__ __forceinline__ Words of(ptx::Vector v) {
        return {{static_cast<uint32_t>(v.lo), static_cast<uint32_t>(v.lo >> 32),
                 static_cast<uint32_t>(v.hi), static_cast<uint32_t>(v.hi >> 32)}};
    }
    __device__ __forceinline__ ptx::Vector vector() const {
        return {w[0] | static_cast<uint64_t>(w[1]) << 32, w[2] | static_cast<uint64_t>(w[3]) << 32};
    }
    // Channel i, in the order of a code's nibbles: the low halves of the words, then the high ones.
    __device__ __forceinline__ uint32_t exponent(int i) const {
        return w[i % 4] >> (i < 4 ? 7 : 23) & 0xff;
    }
    __device__ __forceinline__ void set_exponent(int i, uint32_t exponent) {
        const int at = i < 4 ? 7 : 23;
        w[i % 4] = (w[i % 4] & ~(0xffu << at)) | exponent << at;
    }
};

// The largest exponent of a warp's words, but at least kEscape - 1: then no exponent lies an escape
// below it whose base would not reach that far.
__device__ __forceinline__ uint32_t base_of(const Words& x) {
    const uint32_t a = __vmaxu2(x.w[0] & Words::kExponents, x.w[1] & Words::kExponents);
    const uint32_t b = __vmaxu2(x.w[2] & Words::kExponents, x.w[3] & Words::kExponents);
    const uint32_t most = __vmaxu2(a, b);
    const uint32_t base = __reduce_max_sync(kFullWarp, max(most >> 16, most & 0xffff)) >> 7;
    return max(base, uint32_t{PackedPiece::kEscape - 1});
}

// Eight channels, packed.
struct PackedStep {
    uint32_t rest[2];  // signs and mantissas, a byte a channel in the order of a row
    uint32_t code;  // nibbles: how far the exponents are below the base; kEscape: farther

    static __device__ __forceinline__ PackedStep of(const Words& x, uint32_t base) {
        constexpr uint32_t kFarthest = PackedPiece::kEscape * Words::kOne;
        uint32_t below[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            below[j] = __vminu2(base * Words::kOne - (x.w[j] & Words::kExponents), kFarthest);
            rest[j] = (x.w[j] & 0x007f007f) | (x.w[j] >> 8 & 0xff80ff80);  // in bytes 0 and 2
        }
        return {{__byte_perm(rest[0], rest[1], 0x6420), __byte_perm(rest[2], rest[3], 0x6420)},
                below[0] >> 7 | below[1] >> 3 | below[2] << 1 | below[3] << 5};
    }
    __device__ __forceinline__ Words words(uint32_t base) const {
        constexpr uint32_t kFarthest = PackedPiece::kEscape * Words::kOne;
        const uint32_t below[4] = {code << 7, code << 3, code >> 1, code >> 5};
        Words x;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t twice = __byte_perm(rest[j / 2], 0, j % 2 == 0 ? 0x1100 : 0x3322);
            x.w[j] = (twice & 0x807f807f) | (base * Words::kOne - (below[j] & kFarthest));
        }
        return x;
    }
    // The lowest bit of each nibble that is an escape.
    __device__ __forceinline__ uint32_t escapes() const {
        const uint32_t pairs = code & code >> 1;
        return pairs & pairs >> 2 & 0x11111111;
    }
};

// Gives each escape of a step its place in the part's list: by lane, then by nibble. `visit` gets
// the place of the lane's first. Whole warps.
template <class Visit>
__device__ __forceinline__ void place_escapes(uint32_t escapes, int& place, Visit visit) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    unsigned left = __ballot_sync(kFullWarp, escapes != 0);
#pragma unroll 1
    while (left != 0) {
        const int whose = __ffs(left) - 1;
        left &= left - 1;
        if (lane == whose) visit(place);
        place += __shfl_sync(kFullWarp, __popc(escapes), whose);
    }
}

// False: it has more escapes than a header holds. All in shared memory.
__device__ __forceinline__ bool pack_part(const LanePart& part, uint8_t* header, uint8_t* body) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    uint32_t bases = 0, escapes = 0;
    PackedStep step[LanePart::kSteps];
#pragma unroll
    for (int u = 0; u < LanePart::kSteps; ++u) {
        const Words x = Words::of(part.v[u]);
        const uint32_t base = base_of(x);
        step[u] = PackedStep::of(x, base);
        bases |= base << (8 * u);
        escapes |= step[u].escapes();
    }
    uint32_t count = 0;
    if (__any_sync(kFullWarp, escapes != 0)) {
#pragma unroll
        for (int u = 0; u < LanePart::kSteps; ++u) count += __popc(step[u].escapes());
        count = __reduce_add_sync(kFullWarp, count);
        if (count > PackedPiece::kMostEscapes) return false;
        int place = 0;
#pragma unroll
        for (int u = 0; u < LanePart::kSteps; ++u) {
            const Words x = Words::of(part.v[u]);
            place_escapes(step[u].escapes(), place, [&](int at) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if ((step[u].escapes() >> (4 * i) & 1) == 0) continue;
                    header[PackedPiece::kFirstEscape + at++] = static_cast<uint8_t>(x.exponent(i));
                }
            });
        }
    }
    if (lane == 0) {
        *reinterpret_cast<uint32_t*>(header) = bases;
        header[PackedPiece::kCount] = static_cast<uint8_t>(count);
    }
    auto* to = reinterpret_cast<uint4*>(body) + lane;
    to[0] = {step[0].rest[0], step[0].rest[1], step[1].rest[0], step[1].rest[1]};
    to[32] = {step[2].rest[0], step[2].rest[1], step[3].rest[0], step[3].rest[1]};
    to[64] = {step[0].code, step[1].code, step[2].code, step[3].code};
    return true;
}

// A piece of whole parts. False: it does not pack, and what was written means nothing.
__device__ __forceinline__ bool pack_piece(const uint8_t* raw, int parts, uint8_t* to) {
#pragma unroll 1
    for (int p = 0; p < parts; ++p) {
        const uint8_t* mine = raw + p * PackedPiece::kRawPart + 16 * (threadIdx.x & 31);
        if (!pack_part(LanePart::load(mine), to + PackedPiece::header(p),
                       to + PackedPiece::body(p))) {
            return false;
        }
    }
    return true;
}

// A part, from this lane's first vector of the body on.
__device__ __forceinline__ LanePart unpack_part(const uint8_t* mine, const uint8_t* its_header) {
    const auto at = [&](int i) { return *reinterpret_cast<const uint4*>(mine + 512 * i); };
    const uint4 first = at(0), second = at(1), codes = at(2);
    const uint4 header = *reinterpret_cast<const uint4*>(its_header);
    const PackedStep step[LanePart::kSteps] = {{{first.x, first.y}, codes.x},
                                               {{first.z, first.w}, codes.y},
                                               {{second.x, second.y}, codes.z},
                                               {{second.z, second.w}, codes.w}};
    Words x[LanePart::kSteps];
#pragma unroll
    for (int u = 0; u < LanePart::kSteps; ++u) x[u] = step[u].words(header.x >> (8 * u) & 0xff);
    if ((header.y & 0xff) != 0) {  // the same on all lanes
        const uint8_t* list = its_header + PackedPiece::kFirstEscape;
        int place = 0;
#pragma unroll
        for (int u = 0; u < LanePart::kSteps; ++u) {
            place_escapes(step[u].escapes(), place, [&](int from) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if ((step[u].escapes() >> (4 * i) & 1) != 0) x[u].set_exponent(i, list[from++]);
                }
            });
        }
    }
    LanePart part;
#pragma unroll
    for (int u = 0; u < LanePart::kSteps; ++u) part.v[u] = x[u].vector();
    return part;
}

// A row whose pieces are packed as the bits say, in its place. From its end: what is written never
// lies over what is still to be read.
__device__ __forceinline__ void unpack_row(uint8_t* row, uint32_t packed, int row_bytes) {
    const int mine = 16 * static_cast<int>(threadIdx.x & 31);
#pragma unroll 1
    for (int part = row_bytes / PackedPiece::kRawPart - 1; part >= 0; --part) {
        const int piece = part / PackedPiece::kParts, p = part % PackedPiece::kParts;
        if ((packed >> piece & 1) == 0) continue;
        uint8_t* at = row + static_cast<int64_t>(piece) * PackedPiece::kRawBytes;
        const LanePart raw =
            unpack_part(at + PackedPiece::body(p) + mine, at + PackedPiece::header(p));
        __syncwarp();  // all have loaded
        raw.store(at + p * PackedPiece::kRawPart + mine);
        __syncwarp();
    }
}

}  // namespace ep::normal

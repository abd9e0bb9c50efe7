// How many CTAs an operation is given, and what each of them does.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/view.h"

namespace ep {

// At least one CTA, at most those that fit at once.
inline int at_most(int64_t ctas, int64_t limit) {
    return static_cast<int>(std::max<int64_t>(1, std::min(ctas, limit)));
}

// Dispatch: from so many tokens, or messages, to a CTA the kernels for many are quicker; from so
// many messages, half of the CTAs had better only send (docs/performance.md has the table).
inline constexpr double kManyTokens = 2.0;
inline constexpr double kManyMessages = 3.5;
inline constexpr double kMessagesToPart = 15.0;
// These kernels run where there is room for CTA 0, one that sends and one that receives.
inline bool are_many(int64_t items, double to_a_cta, int ctas) {
    return ctas > 2 && static_cast<double>(items) >= to_a_cta * ctas;
}

// Few messages are received in parts, by a CTA each, while these are no more than the SMs; the
// first part has all that is not row. Returns the logarithm of their number.
inline constexpr int kMostPartBits = 1;
inline int part_bits(const View& view, int64_t messages, int64_t sms) {
    int bits = kMostPartBits;
    while (bits > 0 &&
           ((messages << bits) > sms || view.row_offset > view.part_lines(bits) * kLinePayload)) {
        --bits;
    }
    return bits;
}

// Tokens of each CTA that sends.
inline int stretch_of(int num_tokens, int ctas) {
    return static_cast<int>(std::max<int64_t>(1, ceil_div(num_tokens, ctas)));
}

// Combine: CTAs that share the work of so many warps. Little work is spread over many SMs, as one
// SM alone would be a narrow door, but not over all: kernels that share SMs with their neighbours
// slow each other down (docs/performance.md).
inline constexpr int64_t kSpread = 24;
inline int64_t ctas_for(int64_t warps) {
    return std::max<int64_t>({1, ceil_div(warps, kCombineThreads / 32), std::min(warps, kSpread)});
}

// Two warps share a unit where the halves, sent and received, take no more than this part of the
// warps that there is room for (measured: up to 16 tokens on two ranks, H=7168).
inline constexpr double kFewUnits = 0.25;
inline bool are_few(int64_t units, int resident_ctas) {
    const int64_t warps = int64_t{resident_ctas} * (kCombineThreads / 32);
    return static_cast<double>(2 * units) <= kFewUnits * static_cast<double>(warps);
}

// A combine's rows are streamed where those of a usual step, K for each token of this rank, take
// more than this part of L2 (measured: from 256 tokens on, K=8, H=7168; with 128 they still fit).
inline constexpr double kStreamedPart = 0.4;
inline bool are_streamed(int64_t row_bytes, int64_t l2_bytes) {
    return static_cast<double>(row_bytes) >= kStreamedPart * static_cast<double>(l2_bytes);
}

// CTAs that send and that receive. Where not all fit, each side gets its part: to receive a token's
// unit takes as long as to send half a unit for each rank (measured with two ranks).
struct Split {
    int send;
    int recv;

    static Split of(int64_t send, int64_t recv, int64_t room, int num_ranks) {
        if (send + recv <= room) return {static_cast<int>(send), static_cast<int>(recv)};
        const int64_t to_send = 2 * send;
        const int64_t to_receive = recv * num_ranks;
        const int part = at_most(room * to_send / (to_send + to_receive), room - 1);
        return {part, static_cast<int>(room - part)};
    }
};

}  // namespace ep

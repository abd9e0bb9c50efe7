// What a group of ranks agreed on: sizes and the format of rows on the wire.
#pragma once

#include "ep/platform.h"

namespace ep {

inline constexpr int kMaxRanks =
    72;  // ranks that share NVLink; also the peer table in kernel arguments
inline constexpr int kMaxTopk = 32;   // one warp holds a token's entries, one lane each
inline constexpr int kMaxHidden = 16384;
inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxTokens = 8192;
inline constexpr int kMaxChains = 8;
inline constexpr int kScaleGroup = 128;  // channels that share one FP8 scale

// kOpaque: rows that the caller has quantised, with as many 4-byte words of scales as it likes.
enum class Wire : int32_t { kBf16 = 0, kFp8 = 1, kOpaque = 2 };
inline constexpr int kNumWires = 3;
enum class Format : int32_t { kBatched = 0, kContiguous = 1, kCompact = 2 };

struct Shape {
    int32_t num_ranks;
    int32_t num_experts;
    int32_t topk;
    int32_t hidden;
    int32_t max_tokens;
    int32_t num_chains;
    Wire wire;  // the widest that an operation may choose: it decides the size of a slot
    int32_t opaque_row_bytes;  // kOpaque alone
    int32_t opaque_scales;     // 4-byte words that come with each row
    Wire combine = Wire::kBf16;  // of the rows of combines, as `wire` of those of dispatches

    EP_HD int num_local_experts() const { return num_experts / num_ranks; }
    EP_HD int owner_of(int expert) const { return expert / num_local_experts(); }
    EP_HD int max_messages() const {
        return num_ranks * max_tokens;
    }  // a rank's inbox, all sources
    // 4-byte words of scales, and bytes of a row.
    EP_HD int num_scales(Wire w) const {
        if (w == Wire::kOpaque) return opaque_scales;
        return w == Wire::kFp8 ? hidden / kScaleGroup : 0;
    }
    EP_HD int row_bytes(Wire w) const {
        if (w == Wire::kOpaque) return opaque_row_bytes;
        return w == Wire::kFp8 ? hidden : 2 * hidden;
    }
    EP_HD bool allows(Wire w) const {
        return w == wire || (wire == Wire::kBf16 && w == Wire::kFp8);
    }
    EP_HD bool allows_combine(Wire w) const {
        return w == combine || (combine == Wire::kBf16 && w == Wire::kFp8);
    }
};

// Returns nullptr if the shape is usable, else what is wrong with it.
inline const char* invalid_reason(const Shape& s) {
    if (s.num_ranks < 1 || s.num_ranks > kMaxRanks) return "num_ranks out of range";
    if (s.num_experts < 1 || s.num_experts > kMaxExperts) return "num_experts out of range";
    if (s.num_experts % s.num_ranks != 0) return "num_experts is not a multiple of num_ranks";
    if (s.topk < 1 || s.topk > kMaxTopk) return "topk out of range";
    if (s.hidden < kScaleGroup || s.hidden > kMaxHidden || s.hidden % kScaleGroup != 0)
        return "hidden is not a multiple of 128 in range";
    if (s.max_tokens < 1 || s.max_tokens > kMaxTokens) return "max_tokens out of range";
    if (s.num_chains < 1 || s.num_chains > kMaxChains) return "num_chains out of range";
    if (s.wire != Wire::kBf16 && s.wire != Wire::kFp8 && s.wire != Wire::kOpaque)
        return "unknown wire format";
    if (s.combine != Wire::kBf16 && s.combine != Wire::kFp8) return "combine is not BF16 or FP8";
    if (s.wire == Wire::kOpaque) {
        if (s.opaque_row_bytes < 16 || s.opaque_row_bytes > 2 * kMaxHidden ||
            s.opaque_row_bytes % 16 != 0)
            return "opaque_row_bytes is not a multiple of 16 in range";
        if (s.opaque_scales < 0 || s.opaque_scales > kMaxHidden / 4)
            return "opaque_scales out of range";
    }
    return nullptr;
}

}  // namespace ep

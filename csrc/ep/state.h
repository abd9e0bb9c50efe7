// Words that outlive an operation: epochs, statistics, faults.
#pragma once

#include "ep/shape.h"

namespace ep {

// Dispatches and combines of a chain are two sequences that do not depend on each other. An
// operation works at its counter + 1; its receive leaves it there, once all its CTAs have read it.
struct ChainState {
    static constexpr uint64_t kEnded = ~0ull;  // so that the epoch after it is 0: Turn::given_up
    uint64_t dispatched;
    uint64_t combined;  // on CUDA kEnded where this rank gave up, until reset()
    uint32_t dispatch_readers;  // CTAs of the running receive that know their epoch
    uint32_t combine_readers;
};

// Sums since the last reset (a graph's reset node zeroes them). One writer: the first CTA of an
// operation. wait_ns holds the latest dispatch only: how long each source kept this rank waiting.
struct StepStats {
    uint64_t messages_sent;
    uint64_t messages_received;
    uint64_t rows_received;    // (message, local expert) pairs
    uint64_t bytes_dispatched; // payload bytes sent to all ranks, this one included
    uint64_t bytes_combined;
    uint64_t wait_ns[kMaxRanks];
};

// Ranks that this one does without: bit r % 64 of word r / 64. Every operation reads it where it
// reads its epoch. A rank that is masked itself does without everybody, itself included.
struct alignas(16) RankMask {
    static constexpr int kWords = 2;
    uint64_t words[kWords];

    EP_HD static uint64_t bit(int r) { return 1ull << (r & 63); }
    EP_HD bool any() const { return (words[0] | words[1]) != 0; }
    EP_HD bool has(int r) const { return (words[r >> 6] & bit(r)) != 0; }
    // What ranks compare. With up to 32 ranks it is the mask.
    EP_HD uint32_t digest() const {
        const uint64_t folded = words[0] ^ (words[1] * 0x9e3779b97f4a7c15ull);
        return static_cast<uint32_t>(folded) ^ (static_cast<uint32_t>(folded >> 32) * 0x9e3779b1u);
    }
};
static_assert(kMaxRanks <= 64 * RankMask::kWords);

enum class FaultCode : uint32_t {
    kNone = 0,
    kTimeout = 1,   // peer did not arrive within the budget
    kAborted = 2,   // rank `rank` gave up waiting for `peer` and told us
    kDesync = 3,    // a tag from the future: ranks issued different sequences
    kCount = 4,     // a peer announced more than the inbox holds
    kRouting = 5,   // expert out of range, or twice in one token; not fatal
    kTerms = 6,     // a peer works under other terms: dispatch_terms, combine_terms
};

// What ranks are called in records: of a part of a group (ep/nodes.h), their numbers in the whole
// group. All zero: a group of its own.
struct Names {
    int32_t first;  // of rank 0 of the part
    int32_t skipped;  // ranks of the whole group between two of the part

    EP_HD int of(int rank) const { return rank < 0 ? rank : first + rank * (1 + skipped); }
};

enum class Op : uint32_t {
    kNone = 0,
    kDispatch = 1,
    kCombine = 2,
    kNormalNotify = 3,
    kNormalDispatch = 4,
    kNormalCombine = 5,
};

struct Fault {
    uint32_t code;   // written last; 0 means the record is empty
    uint32_t op;
    int32_t chain;
    int32_t rank;    // who noticed
    int32_t peer;    // who is to blame, or -1
    uint32_t count;  // routing faults: entries dropped
    uint64_t expected;
    uint64_t seen;
};

// Host-mapped. `claimed` makes the first fatal fault win.
struct FaultBoard {
    Fault fatal;
    Fault routing;
    uint32_t claimed;
    uint32_t routing_claimed;
};

// How rows of a dispatch travel. Whoever keeps exponents of scales alone needs rounded ones.
struct RowTerms {
    Wire wire;
    bool rounded;  // FP8: scales are powers of two
};

// What ranks must agree on in every operation: the mask, how rows travel, and in a combine whether
// weights come with it and which dispatch (its epoch, as far as there is room) it is of.
inline constexpr int kRoundedTerm = 40, kLateTerm = 41, kEpochTerm = 48;  // bits
EP_HD uint64_t dispatch_terms(uint32_t mask_digest, RowTerms rows) {
    return static_cast<uint64_t>(static_cast<uint32_t>(rows.wire)) << 32 | mask_digest |
           static_cast<uint64_t>(rows.rounded) << kRoundedTerm;
}
EP_HD uint64_t combine_terms(uint32_t mask_digest, Wire wire, bool late_weights,
                             uint64_t dispatched) {
    return dispatch_terms(mask_digest, {wire, false}) |
           static_cast<uint64_t>(late_weights) << kLateTerm | dispatched << kEpochTerm;
}
// A dispatch's, in the one word that is free beside its counts.
EP_HD uint32_t mix_terms(uint32_t mask_digest, RowTerms rows) {
    const uint32_t way = static_cast<uint32_t>(rows.wire) * 2 + (rows.rounded ? 1 : 0);
    return mask_digest ^ way * 0x9e3779b1u;
}
// May a rank with this mask, that needs its rows so, take a dispatch with this word?
EP_HD bool suits(uint32_t word, uint32_t mask_digest, RowTerms needed) {
    if (word == mix_terms(mask_digest, {needed.wire, true})) return needed.wire == Wire::kFp8;
    return !needed.rounded && word == mix_terms(mask_digest, needed);
}
// What a peer's word means to it: other rows, or else another mask. It does not say whether the
// rows of another mask are rounded; of up to 32 ranks the digest is the mask, the smaller number.
EP_HD uint64_t unmix_terms(uint32_t word, uint32_t mask_digest, RowTerms needed) {
    for (int way = 0; way < 2 * kNumWires; ++way) {
        const RowTerms rows{static_cast<Wire>(way / 2), way % 2 != 0};
        if (word == mix_terms(mask_digest, rows)) return dispatch_terms(mask_digest, rows);
    }
    const RowTerms plain{needed.wire, false}, rounded{needed.wire, needed.wire == Wire::kFp8};
    const uint32_t one = mix_terms(word, plain), other = mix_terms(word, rounded);
    return other < one ? dispatch_terms(other, rounded) : dispatch_terms(one, plain);
}

// The abort word in a heap: who noticed what about whom. 0: all is well.
EP_HD uint64_t pack_abort(FaultCode code, int rank, int peer) {
    return (static_cast<uint64_t>(code) << 32) | (static_cast<uint64_t>(rank + 1) << 16) |
           static_cast<uint64_t>(peer + 1);
}
EP_HD int abort_rank(uint64_t word) { return static_cast<int>((word >> 16) & 0xffff) - 1; }
EP_HD int abort_peer(uint64_t word) { return static_cast<int>(word & 0xffff) - 1; }
EP_HD FaultCode abort_code(uint64_t word) { return static_cast<FaultCode>(word >> 32); }

}  // namespace ep

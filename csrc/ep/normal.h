// Normal (prefill, training) operations: what travels, where it lies, what ranks tell each other.
//
// Words: a rank's rows go to the *block* of each destination, the receive memory that the
// destination chose for this call; a combine's rows go to the *inbox* of each source. Both are
// stretches of the rank's data heap, found by the offset that their owner publishes in its credit
// word.
//
// Tensors without elements have no address: that an array is in use follows from topk (dispatch),
// from num_scales, and from out_weights (combine), never from the addresses of what goes in.
#pragma once

#include "ep/layout.h"
#include "ep/state.h"

namespace ep::normal {

inline constexpr int kLine = 128;
inline constexpr int kNumChunks = 2048;  // of a combine's rows from one rank to one source
inline constexpr int kMaxRowBytes = 2 * kMaxHidden;
inline constexpr int kRowMultiple = 16;  // bytes: rows are moved as 16-byte vectors
inline constexpr int kMaxTokensPerRank = 1 << 20;

// A rank's dispatch is done when its parts, which need not know of each other, have added up to one
// unit: part i of n adds its share.
inline constexpr uint64_t kDoneUnit = uint64_t{1} << 32;
EP_HD uint64_t done_word(uint64_t epoch) { return epoch * kDoneUnit; }
EP_HD uint64_t done_share(uint64_t i, uint64_t n) {
    return kDoneUnit * (i + 1) / n - kDoneUnit * i / n;
}

// A chunk of a combine's rows is there; with kPackedRows, rows in it may have packed pieces.
inline constexpr uint64_t kPackedRows = uint64_t{1} << 63;
EP_HD uint64_t chunk_word(uint64_t epoch, bool packed) {
    return packed ? epoch | kPackedRows : epoch;
}

// What the owner of a block or an inbox tells every rank, at the start of its own operation.
// `epoch` comes with the rest, or after it: who finds it may write there.
struct Credit {
    int64_t offset;  // in the owner's data heap
    int64_t rows;    // of the block; unused in combine
    uint64_t epoch;
    uint64_t terms;  // pack_terms(); 0 where rows cross nodes by puts, which have their own checks
};

// What all ranks of an operation have to agree on, as both sides lay out a block or an inbox by it.
// Whether arrays are given is no part of it: those of a rank without tokens have no address.
EP_HD uint64_t pack_terms(int64_t row_bytes, int num_scales, int topk, int num_experts) {
    return 1 | static_cast<uint64_t>(row_bytes / kRowMultiple) << 1 |
           static_cast<uint64_t>(num_scales) << 16 | static_cast<uint64_t>(topk) << 32 |
           static_cast<uint64_t>(num_experts) << 40;
}

// Every word that peers write and this rank waits for. Tags are epochs of the operation; they are
// never reset. One writer each: the rank that the index names.
struct ControlLayout {
    int32_t num_ranks;
    int32_t max_local_experts;
    int64_t
        notify_stride;  // bytes of one notify message, tagged lines on CUDA, a tag last on the host
    int64_t notify_offset;  // [2 slots][R]: int32 tokens to each rank [R], then rows per expert [L]
    int64_t dispatch_credit_offset;  // [R] lines: Credit
    int64_t combine_credit_offset;  // [R] lines: Credit
    int64_t
        done_offset;  // [R] lines: done_word(epoch); all rows of the source's dispatch are there
    int64_t
        chunk_offset;  // [R][kNumChunks] uint64: chunk_word(); the rows are there. Host: chunk 0
    int64_t bytes;
    static constexpr int64_t kAbortOffset = HeapLayout::kAbortOffset;

    // start: where the words lie; of a part of a group, behind those of the parts before it.
    static EP_HD ControlLayout make(int num_ranks, int max_experts, int64_t start = kLine) {
        ControlLayout c{};
        c.num_ranks = num_ranks;
        c.max_local_experts = static_cast<int32_t>(ceil_div(max_experts, num_ranks));
        c.notify_stride = ceil_div(4LL * (num_ranks + c.max_local_experts), 120) * kLine;
        c.notify_offset = start;
        c.dispatch_credit_offset = c.notify_offset + 2 * num_ranks * c.notify_stride;
        c.combine_credit_offset = c.dispatch_credit_offset + num_ranks * kLine;
        c.done_offset = c.combine_credit_offset + num_ranks * kLine;
        c.chunk_offset = c.done_offset + num_ranks * kLine;
        c.bytes = c.chunk_offset + 8LL * num_ranks * kNumChunks;
        return c;
    }
};

// What a dispatch leaves at a destination: `rows` rows by source rank, then token. The rows
// themselves come last: of a block that was chosen ahead, what is behind them goes back.
struct BlockLayout {
    int64_t scales;  // float32 or packed 4-byte words [rows, num_scales]
    int64_t topk_idx;  // int64 [rows, K]: local expert, or -1
    int64_t topk_weights;  // float32 [rows, K]
    int64_t source_token;  // int32 [rows]: the row's index at its source
    int64_t x;  // [rows, row_bytes]
    int64_t bytes;

    static EP_HD BlockLayout make(int64_t rows, int64_t row_bytes, int num_scales, int topk) {
        BlockLayout b{};
        b.scales = 0;
        b.topk_idx = b.scales + round_up(rows * num_scales * 4, kLine);
        b.topk_weights = b.topk_idx + round_up(rows * topk * 8, kLine);
        b.source_token = b.topk_weights + round_up(rows * topk * 4, kLine);
        b.x = b.source_token + round_up(rows * 4, kLine);
        b.bytes = b.x + round_up(rows * row_bytes, kLine);
        return b;
    }
};

// How many rows a dispatch's block has.
enum class BlockSize : int32_t {
    kExact,  // as many as come
    kPadded,  // any number: rows that nobody sends get no expert
    // Chosen before the host knows how many come; all blocks have the same number, or are exact.
    // Rows that nobody sends stay as they are. Nothing happens if more come to some rank.
    kAhead,
};

// What a combine leaves at a source: BF16 rows of the other ranks, in rank order, each rank's in
// the order of its block; then which of their pieces are packed, and their top-k weights. rows: the
// tokens that the source sent to other ranks.
struct InboxLayout {
    int64_t packed;  // uint32 [rows]: bit i: piece i is a PackedPiece; of chunks with kPackedRows
    int64_t topk_weights;  // float32 [rows, K]
    int64_t bytes;

    static EP_HD InboxLayout make(int64_t rows, int64_t hidden, int topk) {
        InboxLayout i{};
        i.packed = round_up(rows * hidden * 2, kLine);
        i.topk_weights = i.packed + round_up(rows * 4, kLine);
        i.bytes = i.topk_weights + round_up(rows * topk * 4, kLine);
        return i;
    }
};

// A piece of a BF16 row, up to four parts of 1024 channels, in three quarters of its bytes, without
// loss: channels that lie together have exponents of similar size. It begins where the raw piece
// would, with the parts' headers; their bodies follow. A part has four steps of 256 channels, one
// after the other in the row; lane l of a warp has channels 8l to 8l + 7 of each. Of a channel, the
// body has
//   a byte: sign and mantissa; [steps 0 and 1, then 2 and 3][lane][step][channel]
//   a nibble, the code: how far its exponent is below the step's base; [lane][step], in a word the
//   even channels first. kEscape: the exponent itself is in the header's list of escapes, which
//   goes by step, lane, nibble.
// A header has the steps' bases, how many escapes there are, and those. A piece with a part of
// more than kMostEscapes goes as it is.
struct PackedPiece {
    static constexpr int kParts = 4;
    static constexpr int kSteps = 4;
    static constexpr int kStepBytes = 512;  // raw
    static constexpr int kRawPart = kSteps * kStepBytes;
    static constexpr int kRawBytes = kParts * kRawPart;
    static constexpr int kEscape = 15;
    static constexpr int kCount = kSteps;  // in a header, in bytes; before it the bases
    static constexpr int kFirstEscape = kCount + 1;
    static constexpr int kHeader = 16;
    static constexpr int kMostEscapes = kHeader - kFirstEscape;
    static constexpr int kBody = kRawPart * 3 / 4;
    static constexpr uint32_t kBits = (1u << kMaxRowBytes / kRawBytes) - 1;  // a row's pieces

    static EP_HD constexpr int header(int part) { return kHeader * part; }
    static EP_HD constexpr int body(int part) { return header(kParts) + kBody * part; }
    static EP_HD constexpr int bytes(int parts) { return body(parts); }
};
static_assert(PackedPiece::bytes(1) <= PackedPiece::kRawPart);
static_assert(PackedPiece::kBits < kRowMultiple);  // an address of a row has room for them

// Tokens from rank s to rank d, out of rank_prefix [R, R] (inclusive over sources).
EP_HD int32_t tokens_before(const int32_t* rank_prefix, int num_ranks, int s, int d) {
    return s == 0 ? 0 : rank_prefix[(s - 1) * num_ranks + d];
}
EP_HD int32_t tokens_between(const int32_t* rank_prefix, int num_ranks, int s, int d) {
    return rank_prefix[s * num_ranks + d] - tokens_before(rank_prefix, num_ranks, s, d);
}

EP_HD int32_t tokens_to(const int32_t* rank_prefix, int num_ranks, int d) {
    return rank_prefix[(num_ranks - 1) * num_ranks + d];
}

// Words of host_counts, int32: what a notify tells the host. `ready` holds the low 32 bits of the
// notify's epoch and is written last, released at system scope; the host polls it.
struct HostCounts {
    static constexpr int kTotal = 0;  // rows that this rank receives
    static constexpr int kExperts = 1;  // [L] rows per local expert, rounded up to the alignment
    int32_t local_experts;

    EP_HD int ready() const { return kExperts + local_experts; }
    EP_HD int most_rows() const { return ready() + 1; }  // the largest kTotal of any rank
    EP_HD int most_inbox() const {
        return ready() + 2;
    }  // most tokens one rank sent to other ranks
};

// This rank's own words. An operation works at its counter + 1 and leaves it there when it ends.
struct State {
    uint64_t budget_ns;  // first, where the waits of low-latency ranks find it too
    uint64_t notified;
    uint64_t dispatched;
    uint64_t combined;
    uint32_t fault_claim;
    uint32_t dropped_entries;  // of topk_idx, out of range; counted for the routing record
    uint32_t tickets[6];  // of CTAs and of work; each kernel leaves its own at zero
    // Of a layout in the making; left at zero.
    uint32_t tokens_per_rank[kMaxRanks];
    uint32_t tokens_per_expert[kMaxExperts];
};

// One of the groups that a rank takes part in (ep/nodes.h). They share the abort word, the fault
// board and its claim, and nothing else: whoever fails in one of them works in none any more.
struct Part {
    int32_t index = 0;  // of its State behind the first part's
    int64_t control_start = kLine;
    Names names{};
};

}  // namespace ep::normal

// The only description of memory: messages, the symmetric heap, and a rank's local memory.
//
// Every byte offset that native code or Python uses comes from here.
#pragma once

#include "ep/shape.h"
#include "ep/state.h"

namespace ep {

// On CUDA everything travels as 128-byte lines. The last 8 bytes of a line are its tag; the other
// 120, granules of 8 bytes, are payload.
inline constexpr int kLineBytes = 128;
inline constexpr int kLinePayload = 120;
inline constexpr int kTagOffset = 120;
inline constexpr int kGranulesPerLine = 15;

EP_HD constexpr int lines_for(int64_t payload_bytes) {
    return static_cast<int>(ceil_div(payload_bytes, kLinePayload));
}

// Rows of a combine travel in units, one warp each. A unit's data lines hold 128 bytes of the row
// each, but for the 8 that the tag displaces; these follow in one more line.
// FP8: seven data lines; the last line also has a scale for each.
inline constexpr int kUnitDataLines = 7;
inline constexpr int kUnitBytes = kUnitDataLines * kLineBytes;
inline constexpr int kUnitLines = kUnitDataLines + 1;
// BF16: fourteen.
inline constexpr int kSumDataLines = 2 * kUnitDataLines;
inline constexpr int kSumBytes = kSumDataLines * kLineBytes;
inline constexpr int kSumLines = kSumDataLines + 1;

// One of a token's K choices, as the sender describes it to every receiver.
struct Entry {
    int32_t expert;    // global expert, or -1
    int32_t position;  // earlier tokens of this source that chose the same expert
    float weight;
};

struct MessageHeader {
    int32_t token;  // index at the source
    int32_t num_entries;
};

// header | entries | scales | row. What tells a receiver where the row goes comes first; the row is
// 16-byte aligned.
struct MessageLayout {
    int32_t header;  // offsets
    int32_t entries;
    int32_t scales;
    int32_t row;
    int32_t bytes;  // payload, a multiple of 16
    int32_t lines;

    static EP_HD MessageLayout make(const Shape& s, Wire wire) {
        MessageLayout m{};
        m.header = 0;
        m.entries = static_cast<int>(sizeof(MessageHeader));
        m.scales = m.entries + s.topk * static_cast<int>(sizeof(Entry));
        m.row = static_cast<int32_t>(
            round_up(m.scales + s.num_scales(wire) * static_cast<int>(sizeof(float)), 16));
        m.bytes = m.row + s.row_bytes(wire);
        m.lines = lines_for(m.bytes);
        return m;
    }
};

// What a source announces to one receiver before its rows, 4 bytes a word: messages, the terms it
// works under (mix_terms), then rows for each of the receiver's experts.
struct CountsLayout {
    int32_t words;
    int32_t bytes;
    int32_t lines;
    int32_t stride;

    static constexpr int kMessages = 0;
    static constexpr int kTerms = 1;
    static constexpr int kRows = 2;

    static EP_HD CountsLayout make(const Shape& s) {
        CountsLayout c{};
        c.words = static_cast<int32_t>(round_up(kRows + s.num_local_experts(), 2));
        c.bytes = c.words * static_cast<int>(sizeof(uint32_t));
        c.lines = lines_for(c.bytes);
        c.stride = c.lines * kLineBytes;
        return c;
    }
};

// A rank's sum for one token on its way home. BF16: [H]. FP8: values [H], then a float32 scale per
// 128 channels: so on the host. On CUDA rows are cut into units; a line of FP8 is 128 channels.
struct SumLayout {
    int32_t bytes;  // payload
    int32_t data_lines;
    int32_t units;
    int32_t lines;  // on CUDA

    static EP_HD SumLayout make(const Shape& s, Wire wire) {
        SumLayout l{};
        if (wire == Wire::kFp8) {
            l.bytes = s.hidden + s.hidden / kScaleGroup * static_cast<int>(sizeof(float));
            l.data_lines = s.hidden / kScaleGroup;
            l.units = static_cast<int>(ceil_div(l.data_lines, kUnitDataLines));
            l.lines = l.units * kUnitLines;
        } else {
            l.bytes = 2 * s.hidden;
            l.data_lines = static_cast<int>(ceil_div(l.bytes, kLineBytes));
            l.units = static_cast<int>(ceil_div(l.data_lines, kSumDataLines));
            l.lines = l.data_lines + l.units;
        }
        return l;
    }
};

// Symmetric heap: written by peers. Per chain, in two halves chosen by the parity of the epoch:
// counts [R], ready lines [R], dispatch inbox [R][M], combine inbox [R][M]; and weights that a
// combine sends ahead of its rows [R]. The first line holds the abort word.
struct HeapLayout {
    CountsLayout counts;
    int32_t message_stride;  // of one dispatch slot, whatever the wire format of the call
    int32_t combine_lines;
    int32_t combine_stride;
    int32_t weights_stride;
    int64_t counts_offset;  // within a chain
    int64_t ready_offset;
    int64_t weights_offset;
    int64_t dispatch_offset;
    int64_t combine_offset;
    int64_t chain_bytes;
    int64_t bytes;

    static constexpr int64_t kAbortOffset = 0;
    static constexpr int64_t kChainsOffset = kLineBytes;

    static EP_HD HeapLayout make(const Shape& s) {
        HeapLayout h{};
        h.message_stride = MessageLayout::make(s, s.wire).lines * kLineBytes;
        h.counts = CountsLayout::make(s);
        h.combine_lines = combine_lines_for(s);
        h.combine_stride = h.combine_lines * kLineBytes;
        h.weights_stride = lines_for(4LL * s.max_tokens * s.topk) * kLineBytes;
        h.counts_offset = 0;
        h.ready_offset = h.counts_offset + 2LL * s.num_ranks * h.counts.stride;
        h.weights_offset = h.ready_offset + 2LL * s.num_ranks * kLineBytes;
        h.dispatch_offset = h.weights_offset + static_cast<int64_t>(s.num_ranks) * h.weights_stride;
        h.combine_offset = h.dispatch_offset + 2LL * s.max_messages() * h.message_stride;
        h.chain_bytes = h.combine_offset + 2LL * s.max_messages() * h.combine_stride;
        h.bytes = kChainsOffset + s.num_chains * h.chain_bytes;
        return h;
    }

    // The most that a combine may choose.
    static EP_HD int combine_lines_for(const Shape& s) {
        const int short_lines = SumLayout::make(s, Wire::kFp8).lines;
        const int lines = SumLayout::make(s, s.combine).lines;
        return lines > short_lines ? lines : short_lines;
    }
    EP_HD int64_t chain(int c) const { return kChainsOffset + c * chain_bytes; }
    EP_HD int64_t counts_slot(const Shape& s, int c, uint64_t epoch, int source) const {
        const int64_t index = static_cast<int64_t>(epoch & 1) * s.num_ranks + source;
        return chain(c) + counts_offset + index * counts.stride;
    }
    EP_HD int64_t ready_line(const Shape& s, int c, uint64_t epoch, int source) const {
        const int64_t index = static_cast<int64_t>(epoch & 1) * s.num_ranks + source;
        return chain(c) + ready_offset + index * kLineBytes;
    }
    EP_HD int64_t weights_slot(int c, int source) const {
        return chain(c) + weights_offset + static_cast<int64_t>(source) * weights_stride;
    }
    EP_HD int64_t dispatch_slot(const Shape& s, int c, uint64_t epoch, int source, int slot) const {
        return chain(c) + dispatch_offset + inbox_index(s, epoch, source, slot) * message_stride;
    }
    EP_HD int64_t combine_slot(const Shape& s, int c, uint64_t epoch, int source, int slot) const {
        return chain(c) + combine_offset + inbox_index(s, epoch, source, slot) * combine_stride;
    }

  private:
    static EP_HD int64_t inbox_index(const Shape& s, uint64_t epoch, int source, int slot) {
        const int64_t half = static_cast<int64_t>(epoch & 1) * s.max_messages();
        return half + static_cast<int64_t>(source) * s.max_tokens + slot;
    }
};

// Where a received message's rows lie in the output, and their weights: what combine reads.
struct alignas(8) RowRef {
    int32_t row;   // row of the combine input; -1 ends the list
    float weight;  // or the bits of its entry's number where the weights come with the combine
};

// What a dispatch leaves for the combines of its handle, in memory of the handle's own.
struct RoutingLayout {
    int64_t received;  // int32 [R]: messages received from each source
    int64_t dispatched;  // uint64: the dispatch's epoch
    int64_t sent;      // int32 [M][R]: slot of token t at rank d, or -1
    int64_t refs;      // RowRef [R*M][K], in k order, ended by row -1
    int64_t bytes;

    static EP_HD RoutingLayout make(const Shape& s) {
        RoutingLayout r{};
        r.received = 0;
        r.dispatched = round_up(4LL * s.num_ranks, 8);
        r.sent = round_up(r.dispatched + 8, 128);
        r.refs = r.sent + round_up(4LL * s.max_tokens * s.num_ranks, 128);
        const int64_t refs = static_cast<int64_t>(s.max_messages()) * s.topk * sizeof(RowRef);
        r.bytes = r.refs + round_up(refs, 128);
        return r;
    }
};

struct Routing {
    int32_t* received;
    uint64_t* dispatched;
    int32_t* sent;
    RowRef* refs;

    static Routing at(uint8_t* base, const Shape& s) {
        const RoutingLayout r = RoutingLayout::make(s);
        return {reinterpret_cast<int32_t*>(base + r.received),
                reinterpret_cast<uint64_t*>(base + r.dispatched),
                reinterpret_cast<int32_t*>(base + r.sent),
                reinterpret_cast<RowRef*>(base + r.refs)};
    }
};

// Memory of this rank alone. Per chain: state and statistics.
struct LocalLayout {
    int64_t state_offset;  // ChainState
    int64_t stats_offset;  // StepStats: what the reset node of a graph zeroes
    int64_t chain_bytes;
    int64_t bytes;

    // Survive reset():
    static constexpr int64_t kBudgetOffset = 0;  // uint64 nanoseconds
    static constexpr int64_t kMaskOffset = 16;   // RankMask
    // and what does not begins here:
    static constexpr int64_t kClaimOffset =
        32;  // uint32: the first fatal fault on a device takes it
    static constexpr int64_t kDroppedOffset = 36;  // uint32: routing entries dropped since reset()
    static constexpr int64_t kChainsOffset = 256;

    static EP_HD LocalLayout make(const Shape& s) {
        LocalLayout l{};
        l.state_offset = 0;
        l.stats_offset = 256;
        l.chain_bytes = l.stats_offset + round_up(sizeof(StepStats), 256);
        l.bytes = kChainsOffset + s.num_chains * l.chain_bytes;
        return l;
    }

    EP_HD int64_t chain(int c) const { return kChainsOffset + c * chain_bytes; }
};

}  // namespace ep

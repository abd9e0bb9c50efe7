// The only description of memory: messages, the symmetric heap, and a rank's local memory.
//
// Every byte offset that native code or Python uses comes from here.
#pragma once

#include "ep/shape.h"
#include "ep/state.h"

namespace ep {

// A message travels as 128-byte lines. The last 8 bytes of a line are its tag; the other 120 are
// payload.
inline constexpr int kLineBytes = 128;
inline constexpr int kLinePayload = 120;
inline constexpr int kTagOffset = 120;

EP_HD constexpr int lines_for(int64_t payload_bytes) {
    return static_cast<int>(ceil_div(payload_bytes, kLinePayload));
}

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
    int32_t stride;  // bytes of one inbox slot

    static EP_HD MessageLayout make(const Shape& s) {
        MessageLayout m{};
        m.header = 0;
        m.entries = static_cast<int>(sizeof(MessageHeader));
        m.scales = m.entries + s.topk * static_cast<int>(sizeof(Entry));
        m.row = static_cast<int32_t>(
            round_up(m.scales + s.num_scales() * static_cast<int>(sizeof(float)), 16));
        m.bytes = m.row + s.row_bytes();
        m.lines = lines_for(m.bytes);
        m.stride = m.lines * kLineBytes;
        return m;
    }
};

// What a source announces to one receiver before its rows: messages, then rows per local expert.
struct CountsLayout {
    int32_t words;  // uint32: [0] messages, [1] zero, [2 + x] rows for local expert x
    int32_t bytes;
    int32_t lines;
    int32_t stride;

    static EP_HD CountsLayout make(const Shape& s) {
        CountsLayout c{};
        c.words = static_cast<int32_t>(round_up(2 + s.num_local_experts(), 2));
        c.bytes = c.words * static_cast<int>(sizeof(uint32_t));
        c.lines = lines_for(c.bytes);
        c.stride = c.lines * kLineBytes;
        return c;
    }
};

// Symmetric heap: written by peers. Per chain: counts [2 slots][R], dispatch inbox [R][M],
// combine inbox [R][M]. The first line holds the abort word.
struct HeapLayout {
    MessageLayout message;
    CountsLayout counts;
    int32_t combine_lines;
    int32_t combine_stride;
    int64_t counts_offset;    // within a chain
    int64_t dispatch_offset;
    int64_t combine_offset;
    int64_t chain_bytes;
    int64_t bytes;

    static constexpr int64_t kAbortOffset = 0;
    static constexpr int64_t kChainsOffset = kLineBytes;

    static EP_HD HeapLayout make(const Shape& s) {
        HeapLayout h{};
        h.message = MessageLayout::make(s);
        h.counts = CountsLayout::make(s);
        h.combine_lines = lines_for(2 * static_cast<int64_t>(s.hidden));
        h.combine_stride = h.combine_lines * kLineBytes;
        h.counts_offset = 0;
        h.dispatch_offset = h.counts_offset + 2LL * s.num_ranks * h.counts.stride;
        h.combine_offset =
            h.dispatch_offset + static_cast<int64_t>(s.max_messages()) * h.message.stride;
        h.chain_bytes =
            h.combine_offset + static_cast<int64_t>(s.max_messages()) * h.combine_stride;
        h.bytes = kChainsOffset + s.num_chains * h.chain_bytes;
        return h;
    }

    EP_HD int64_t chain(int c) const { return kChainsOffset + c * chain_bytes; }
    EP_HD int64_t counts_slot(const Shape& s, int c, uint64_t epoch, int source) const {
        const int64_t index = static_cast<int64_t>(epoch & 1) * s.num_ranks + source;
        return chain(c) + counts_offset + index * counts.stride;
    }
    EP_HD int64_t dispatch_slot(const Shape& s, int c, int source, int slot) const {
        const int64_t index = static_cast<int64_t>(source) * s.max_tokens + slot;
        return chain(c) + dispatch_offset + index * message.stride;
    }
    EP_HD int64_t combine_slot(const Shape& s, int c, int source, int slot) const {
        const int64_t index = static_cast<int64_t>(source) * s.max_tokens + slot;
        return chain(c) + combine_offset + index * combine_stride;
    }
};

// Where a received message's rows lie in the output, and their weights: what combine reads.
struct RowRef {
    int32_t row;   // row of the combine input; -1 ends the list
    float weight;
};

// Memory of this rank alone. Per chain: state, statistics, the routing that combine needs.
struct LocalLayout {
    int64_t state_offset;     // ChainState
    int64_t stats_offset;     // StepStats: what the reset node of a graph zeroes
    int64_t received_offset;  // int32 [R]: messages received from each source
    int64_t sent_offset;      // int32 [M][R]: slot of token t at rank d, or -1
    int64_t refs_offset;      // RowRef [R*M][K], in k order, ended by row -1
    int64_t chain_bytes;
    int64_t bytes;

    static constexpr int64_t kBudgetOffset = 0;  // uint64 nanoseconds; survives reset()
    static constexpr int64_t kClaimOffset =
        8;   // uint32: the first fatal fault on a device takes it
    static constexpr int64_t kDroppedOffset = 12;  // uint32: routing entries dropped since reset()
    static constexpr int64_t kChainsOffset = 256;

    static EP_HD LocalLayout make(const Shape& s) {
        LocalLayout l{};
        l.state_offset = 0;
        l.stats_offset = 256;
        l.received_offset = l.stats_offset + round_up(sizeof(StepStats), 256);
        l.sent_offset = l.received_offset + round_up(4LL * s.num_ranks, 256);
        l.refs_offset = l.sent_offset + round_up(4LL * s.max_tokens * s.num_ranks, 256);
        const int64_t refs = static_cast<int64_t>(s.max_messages()) * s.topk * sizeof(RowRef);
        l.chain_bytes = l.refs_offset + round_up(refs, 256);
        l.bytes = kChainsOffset + s.num_chains * l.chain_bytes;
        return l;
    }

    EP_HD int64_t chain(int c) const { return kChainsOffset + c * chain_bytes; }
};

}  // namespace ep

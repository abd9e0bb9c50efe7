// What a kernel sees of a rank: one chain's addresses and sizes, worked out on the host.
//
// Passed by value, so that the kernels use them as constant operands. `peer` comes last: with few
// ranks most of it is never touched.
#pragma once

#include "ep/heap.h"

namespace ep {

inline constexpr int kThreads = 512;  // of a CTA that dispatches
inline constexpr int kRowThreads = kThreads - 64;  // of those, the ones that hold rows: roles.cuh
inline constexpr int kCombineThreads = 256;  // of a CTA that combines
inline constexpr int kVectorsPerLine = 8;

struct View {
    int32_t num_ranks;
    int32_t rank;
    Names names;
    int32_t chain;
    bool starts_early;  // launched with programmatic dependent launch
    int32_t num_experts;
    int32_t local_experts;
    int32_t topk;
    int32_t hidden;
    int32_t max_tokens;
    int32_t max_messages;
    FastDiv by_ranks;
    FastDiv by_local_experts;
    FastDiv by_topk;

    // Dispatch messages of one wire format, in vectors (16 bytes) and bytes.
    int32_t input_vectors;  // of a row as the caller gives it
    int32_t row_vectors;  // as it travels
    int32_t num_scales;
    int32_t header_offset;
    int32_t entries_offset;
    int32_t scales_offset;
    int32_t row_offset;
    int32_t message_bytes;
    int32_t message_vectors;
    int32_t message_stride;
    int32_t counts_vectors;
    int32_t counts_stride;
    int32_t counts_words;
    int32_t counts_gap;  // words of a rank's counts that are not rows
    FastDiv by_counts;  // by counts_vectors

    // Combine rows.
    int32_t sum_lines;  // of data, BF16
    int32_t sums;  // units of a row, whatever it travels as
    int32_t fp8_sum_bytes;
    int32_t combine_stride;
    FastDiv by_sums;
    FastDiv by_others;  // the ranks but this one; at least one

    // This rank's memory.
    const uint8_t* counts_in;  // [2][R]
    const uint8_t* ready_in;  // [2][R]
    const uint8_t* weights_in;  // [R]
    const uint8_t* dispatch_in;  // [2][R][M]
    const uint8_t* combine_in;  // [2][R][M]
    ChainState* state;
    StepStats* stats;
    const RankMask* mask;  // null: nobody is ever masked (normal operations)
    const uint64_t* budget_ns;
    uint32_t* fault_claim;
    uint32_t* dropped_entries;
    FaultBoard* faults;

    // Where this rank's messages go, behind a peer's heap.
    int64_t counts_out;  // of even epochs; of odd ones R strides on
    int64_t ready_out;
    int64_t weights_out;
    int64_t dispatch_out;
    int64_t combine_out;
    int64_t dispatch_half;  // bytes from the inbox of even epochs to that of odd ones
    int64_t combine_half;
    int32_t weights_stride;
    uint8_t* peer[kMaxRanks];

    // Bytes of a message in shared memory, without its tags, to the end of its last line.
    EP_HD int message_room() const { return message_vectors / kVectorsPerLine * kLinePayload; }
    // Lines of each of 2^`bits` parts of a message; the last may have fewer.
    EP_HD int part_lines(int bits) const {
        const int lines = message_vectors / kVectorsPerLine;
        const int each = (lines + (1 << bits) - 1) >> bits;
        return bits == 0 ? lines : each + (each & 1);
    }
    EP_HD int owner_of(int expert) const { return by_local_experts(expert); }
    EP_HD int64_t dispatch_at(uint64_t epoch) const { return (epoch & 1) != 0 ? dispatch_half : 0; }
    EP_HD int64_t combine_at(uint64_t epoch) const { return (epoch & 1) != 0 ? combine_half : 0; }

    static View make(const Context& ctx, int chain, Wire wire) {
        const Shape& s = ctx.shape;
        const HeapLayout& h = ctx.layout;
        View v{};
        v.num_ranks = s.num_ranks;
        v.rank = ctx.rank;
        v.names = ctx.names;
        v.chain = chain;
        v.num_experts = s.num_experts;
        v.local_experts = ctx.local_experts;
        v.topk = s.topk;
        v.hidden = s.hidden;
        v.max_tokens = s.max_tokens;
        v.max_messages = s.max_messages();
        v.by_ranks = ctx.by_ranks;
        v.by_local_experts = ctx.by_local_experts;
        v.by_topk = ctx.by_topk;

        const MessageLayout m = MessageLayout::make(s, wire);
        v.row_vectors = s.row_bytes(wire) / 16;
        v.input_vectors = wire == Wire::kFp8 ? s.hidden / 8 : v.row_vectors;
        v.num_scales = s.num_scales(wire);
        v.header_offset = m.header;
        v.entries_offset = m.entries;
        v.scales_offset = m.scales;
        v.row_offset = m.row;
        v.message_bytes = m.bytes;
        v.message_vectors = m.lines * kVectorsPerLine;
        v.message_stride = h.message_stride;
        v.counts_vectors = h.counts.lines * kVectorsPerLine;
        v.counts_stride = h.counts.stride;
        v.counts_words = h.counts.words;
        v.counts_gap = h.counts.words - ctx.local_experts;
        v.by_counts = FastDiv::by(static_cast<uint32_t>(v.counts_vectors));

        const SumLayout sum = SumLayout::make(s, Wire::kBf16);
        v.sums = sum.units;
        v.sum_lines = sum.data_lines;
        v.fp8_sum_bytes = SumLayout::make(s, Wire::kFp8).bytes;
        v.combine_stride = h.combine_stride;
        v.by_sums = FastDiv::by(static_cast<uint32_t>(v.sums));
        v.by_others = FastDiv::by(static_cast<uint32_t>(s.num_ranks > 1 ? s.num_ranks - 1 : 1));

        v.counts_in = ctx.counts_at(ctx.rank, chain, 0, 0);
        v.ready_in = ctx.ready_at(ctx.rank, chain, 0, 0);
        v.weights_in = ctx.weights_at(ctx.rank, chain, 0);
        v.dispatch_in = ctx.dispatch_at(ctx.rank, chain, 0, 0, 0);
        v.combine_in = ctx.combine_at(ctx.rank, chain, 0, 0, 0);
        v.state = ctx.state(chain);
        v.stats = ctx.stats(chain);
        v.mask = ctx.mask();
        v.budget_ns = ctx.budget_ns();
        v.fault_claim = ctx.fault_claim();
        v.dropped_entries = ctx.dropped_entries();
        v.faults = ctx.faults;

        v.counts_out = h.counts_slot(s, chain, 0, ctx.rank);
        v.ready_out = h.ready_line(s, chain, 0, ctx.rank);
        v.weights_out = h.weights_slot(chain, ctx.rank);
        v.dispatch_out = h.dispatch_slot(s, chain, 0, ctx.rank, 0);
        v.combine_out = h.combine_slot(s, chain, 0, ctx.rank, 0);
        v.dispatch_half = static_cast<int64_t>(s.max_messages()) * h.message_stride;
        v.combine_half = static_cast<int64_t>(s.max_messages()) * h.combine_stride;
        v.weights_stride = h.weights_stride;
        for (int r = 0; r < s.num_ranks; ++r) v.peer[r] = ctx.heap[r];
        return v;
    }
};

}  // namespace ep

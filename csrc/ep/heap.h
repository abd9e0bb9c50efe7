// Addresses: this rank's view of everybody's heap, and of its own local memory.
#pragma once

#include "ep/layout.h"

namespace ep {

// Everything an operation needs to know besides its tensors. Passed to kernels by value.
struct Context {
    Shape shape;
    HeapLayout layout;
    LocalLayout local_layout;
    int32_t local_experts;
    FastDiv by_ranks;
    FastDiv by_local_experts;
    FastDiv by_topk;
    int32_t rank;
    Names names;
    FaultBoard* faults;
    bool knows_no_mask;  // of normal operations, whose local memory is another (ep/normal.h)
    uint8_t* local;
    uint8_t* heap[kMaxRanks];  // by rank; heap[rank] is this rank's own

    void set_shape(const Shape& s) {
        shape = s;
        layout = HeapLayout::make(s);
        local_layout = LocalLayout::make(s);
        local_experts = s.num_local_experts();
        by_ranks = FastDiv::by(static_cast<uint32_t>(s.num_ranks));
        by_local_experts = FastDiv::by(static_cast<uint32_t>(local_experts));
        by_topk = FastDiv::by(static_cast<uint32_t>(s.topk));
    }

    EP_HD uint64_t* abort_word(int r) const {
        return reinterpret_cast<uint64_t*>(heap[r] + HeapLayout::kAbortOffset);
    }
    EP_HD uint8_t* counts_at(int owner, int chain, uint64_t epoch, int source) const {
        return heap[owner] + layout.counts_slot(shape, chain, epoch, source);
    }
    EP_HD uint8_t* ready_at(int owner, int chain, uint64_t epoch, int source) const {
        return heap[owner] + layout.ready_line(shape, chain, epoch, source);
    }
    EP_HD uint8_t* weights_at(int owner, int chain, int source) const {
        return heap[owner] + layout.weights_slot(chain, source);
    }
    EP_HD uint8_t* dispatch_at(int owner, int chain, uint64_t epoch, int source, int slot) const {
        return heap[owner] + layout.dispatch_slot(shape, chain, epoch, source, slot);
    }
    EP_HD uint8_t* combine_at(int owner, int chain, uint64_t epoch, int source, int slot) const {
        return heap[owner] + layout.combine_slot(shape, chain, epoch, source, slot);
    }

    EP_HD const uint64_t* budget_ns() const {
        return reinterpret_cast<const uint64_t*>(local + LocalLayout::kBudgetOffset);
    }
    EP_HD RankMask* mask() const {
        return reinterpret_cast<RankMask*>(local + LocalLayout::kMaskOffset);
    }
    EP_HD uint32_t* fault_claim() const {
        return reinterpret_cast<uint32_t*>(local + LocalLayout::kClaimOffset);
    }
    EP_HD uint32_t* dropped_entries() const {
        return reinterpret_cast<uint32_t*>(local + LocalLayout::kDroppedOffset);
    }
    template <class T>
    EP_HD T* local_at(int chain, int64_t offset) const {
        return reinterpret_cast<T*>(local + local_layout.chain(chain) + offset);
    }
    EP_HD ChainState* state(int chain) const {
        return local_at<ChainState>(chain, local_layout.state_offset);
    }
    EP_HD StepStats* stats(int chain) const {
        return local_at<StepStats>(chain, local_layout.stats_offset);
    }
};

// The tensors of a dispatch send. Rows are BF16, or opaque bytes with their scales.
struct SendInput {
    Wire wire;
    bool round_scale;  // FP8: scales are powers of two
    const uint8_t* x;
    int64_t row_stride;  // bytes
    const uint32_t* scales;  // opaque rows: 4-byte words
    int64_t scale_row_stride;    // words
    int64_t scale_group_stride;  // words
    const void* topk_idx;  // [T, K] int32 or int64
    int32_t idx_bytes;     // 4 or 8
    const float* weights;  // [T, K]; nullptr: they come with the combine
    int32_t num_tokens;    // rows of the tensors
    const int32_t* num_valid;  // device scalar; nullptr: all rows are real
    Routing routing;

    EP_HD RowTerms rows() const { return {wire, wire == Wire::kFp8 && round_scale}; }
    EP_HD int expert(int64_t entry) const {
        if (idx_bytes == 4) return static_cast<const int32_t*>(topk_idx)[entry];
        const int64_t wide = static_cast<const int64_t*>(topk_idx)[entry];
        return wide < -1 || wide > 0x7fffffff ? -2 : static_cast<int>(wide);
    }
};

// How scales lie beside received rows, in 4-byte words: scale g of row i of expert x is at
// x * expert_stride + i * row_stride + g * group_stride. Formats without experts have one, 0.
struct ScaleTarget {
    uint32_t* words;
    bool ue8m0;  // four exponents to a word instead of one float32
    int32_t expert_stride;
    int32_t row_stride;
    int32_t group_stride;
};

// Where a dispatch receive puts rows. Arrays that a format lacks, or nobody asked for, are nullptr.
struct RecvTarget {
    Format format;
    Wire wire;
    int32_t alignment;       // contiguous: each expert's first row is a multiple of it
    uint8_t* x;              // batched [L, R*M, H], contiguous [rows, H], compact [R*M, H]
    int32_t num_rows;        // of x, those of all experts
    ScaleTarget scales;
    int32_t* recv_count;     // [L]
    int32_t* expert_offset;  // contiguous: [L + 1]
    int32_t* topk_idx;       // compact: [R*M, K] local expert or -1
    float* topk_weights;     // compact: [R*M, K]
    int32_t* num_messages;   // [R]
    int32_t* source_token;   // batched: [L, R*M] the row's token at its source
    int64_t* layout_range;   // batched: [L, R] (first row << 32) | rows, of each source
    int32_t* cumulative_count;  // [L] += recv_count
    int64_t* wait_ns;        // [R] += nanoseconds that each source kept this rank waiting
    Routing routing;

    EP_HD RowTerms rows() const { return {wire, wire == Wire::kFp8 && scales.ue8m0}; }
};

// The rows a combine sends home, BF16, as the receive laid them out. `wire`: how their sums travel;
// it and late_weights are the same in the input and the output.
struct CombineInput {
    Wire wire = Wire::kBf16;
    const uint16_t* y;
    int64_t row_stride;  // elements
    bool late_weights;   // the dispatch had none: `weights` go ahead of the rows
    const float* weights;  // [T, K]
    int32_t num_tokens;  // of this rank, for the weights
    Routing routing;
};

struct CombineOutput {
    Wire wire = Wire::kBf16;
    bool late_weights = false;
    uint16_t* out;  // [T, H]
    int32_t num_tokens;
    const int32_t* num_valid;  // device scalar; nullptr: all rows are real
    int64_t* wait_ns;  // [R], as above
    Routing routing;
};

}  // namespace ep

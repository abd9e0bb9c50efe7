// Where a message's rows go here, and the note of it that combine follows.
#pragma once

#include "cuda/inbox.cuh"
#include "ep/fp8.h"

namespace ep {

// Lane k: the row of entry k, or -1 if it is not ours. Every warp works it out for itself, which is
// quicker than telling the others.
__device__ __forceinline__ int place_entry(const View& view, const RecvTarget& target, int source,
                                           const Entry& entry, RecvScratch scratch) {
    const int local_experts = view.local_experts;
    const int x = entry.expert - view.rank * local_experts;
    if (x < 0 || x >= local_experts) return -1;
    const int byte = RecvScratch::byte_of(CountsLayout::kRows + x);
    const int32_t announced = scratch.count(view, source, byte);
    int row = entry.position;
#pragma unroll 1
    for (int s = 0; s < source; ++s) row += scratch.count(view, s, byte);
    row += target.format == Format::kBatched ? x * view.max_messages : scratch.first_row[x];
    const bool announces = static_cast<uint32_t>(entry.position) < static_cast<uint32_t>(announced);
    if (announces && row < target.num_rows) return row;
    // A damaged heap: the row would lie beyond the source's own, or, of counts that are possible
    // one by one, beyond all that messages have entries for.
    fail(view, FaultCode::kCount, Op::kDispatch, source, announces ? target.num_rows : announced,
         announces ? row : entry.position);
    return -1;
}

// Where the scales of a lane's row begin. `x`: its local expert.
__device__ __forceinline__ int first_scale(const View& view, const RecvTarget& target, int row,
                                           int x) {
    const bool batched = target.format == Format::kBatched;
    const int within = batched ? row - x * view.max_messages : row;
    return (batched ? x * target.scales.expert_stride : 0) + within * target.scales.row_stride;
}

// Word i of a row's scales as the caller wants them.
__device__ __forceinline__ uint32_t scale_word(const uint32_t* scales, int i, int num_scales,
                                               bool as_ue8m0) {
    if (!as_ue8m0) return scales[i];
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (4 * i + j < num_scales) word |= ue8m0(scales[4 * i + j]) << (8 * j);
    }
    return word;
}

// What a warp knows of a message, entry k at lane k.
struct Placed {
    Entry entry;
    int row;  // -1: not ours
    unsigned has_row;  // of lanes
    int first_scale;
};

// Whole warps. `head`: of the message, in shared memory.
__device__ __forceinline__ Placed place_message(const View& view, const RecvTarget& target,
                                                const InboxItem& item, const uint64_t* head,
                                                RecvScratch scratch) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(head);
    const auto* entries = reinterpret_cast<const Entry*>(bytes + view.entries_offset);
    const int lane = threadIdx.x & 31;
    const bool compact = target.format == Format::kCompact;
    const Entry entry = lane < view.topk ? entries[lane] : Entry{-1, 0, 0.0f};
    int row = -1;
    if (compact) {
        if (lane == 0) row = messages_before(item.source, scratch) + item.slot;
    } else {
        row = place_entry(view, target, item.source, entry, scratch);
    }
    const int x = compact ? 0 : entry.expert - view.rank * view.local_experts;
    return {entry, row, __ballot_sync(kFullWarp, row >= 0), first_scale(view, target, row, x)};
}

// One warp: what combine needs to find the rows of a message again.
__device__ inline void note_rows(const View& view, const RecvTarget& target, const InboxItem& item,
                                 const uint64_t* head, const Placed& placed) {
    const Entry entry = placed.entry;
    const int row = placed.row;
    const auto* bytes = reinterpret_cast<const uint8_t*>(head);
    const int token = reinterpret_cast<const MessageHeader*>(bytes + view.header_offset)->token;
    const int topk = view.topk;
    const int lane = threadIdx.x & 31;
    if (target.format == Format::kCompact && lane < topk) {
        const int local_experts = view.local_experts;
        const int x = entry.expert - view.rank * local_experts;
        const bool mine = x >= 0 && x < local_experts;
        const int64_t at =
            static_cast<int64_t>(__shfl_sync((1ull << topk) - 1, row, 0)) * topk + lane;
        target.topk_idx[at] = mine ? x : -1;
        target.topk_weights[at] = mine ? entry.weight : 0.0f;
    }
    __syncwarp();
    const int at_inbox = item.source * view.max_tokens + item.slot;
    RowRef* refs = target.routing.refs + static_cast<int64_t>(at_inbox) * topk;
    const int index = __popc(placed.has_row & ((1u << lane) - 1));
    const float weight = target.format == Format::kCompact ? 1.0f : entry.weight;
    if (row >= 0) {
        refs[index] = {row, weight};
        if (target.source_token != nullptr) target.source_token[row] = token;
    }
    if (lane == 0 && __popc(placed.has_row) < topk) refs[__popc(placed.has_row)] = {-1, 0.0f};
}

}  // namespace ep

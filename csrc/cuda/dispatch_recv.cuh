// Dispatch, second half: each message is pulled out of the inbox and fanned out to its local
// experts.
//
// Order of rows: by source rank, then by token. Nothing depends on arrival order or on the grid.
// CTA 0 keeps the books: it reports what came. The others take items of the inbox, each a slot or,
// of few messages, a part of one: known before any count has arrived. So three waits go on at once:
// the clerk's for counts, the router's for the head of the message, and that of the other warps for
// the row.
#pragma once

#include "cuda/counts.cuh"
#include "cuda/places.cuh"

namespace ep {

// The router: awaits the message's head, and tells the others where the message goes. `counted`:
// the clerk has all counts; it waits for that once. False: gave up.
__device__ __forceinline__ bool find_places(const View& view, const RecvTarget& target,
                                            Watch& watch, const InboxItem& item, uint64_t epoch,
                                            bool counted, RecvScratch scratch, Placed& placed) {
    Landings& to = *scratch.landings;
    const int lane = threadIdx.x & 31;
    Pulled pulled = Pulled::kNothing;
    if (item.slot < view.max_tokens) {
        pulled = pull_slot<1, 32>(view, watch, item, 0, min(32, view.message_vectors), epoch, true,
                                  scratch, scratch.head);
    }
    __syncwarp();
    if (!counted) ptx::await_phase(&scratch.waits->counts, 0);
    if (pulled == Pulled::kGaveUp || to.end == Landings::kNoCounts) return false;
    // A rank that is masked here and does not know may have sent something.
    if (pulled == Pulled::kNothing || item.slot >= scratch.announced[item.source]) {
        if (lane == 0) to.count = Landings::kNothing;
        return true;
    }
    placed = place_message(view, target, item, scratch.head, scratch);
    const int index = __popc(placed.has_row & ((1u << lane) - 1));
    if (placed.row >= 0) {
        to.row[index] = placed.row;
        to.first_scale[index] = placed.first_scale;
    }
    if (lane == 0) to.count = __popc(placed.has_row);
    return true;
}

// The message in shared memory to every place it has here: the warps that hold rows copy the row,
// the clerk its scales.
__device__ __forceinline__ void copy_row(const View& view, const RecvTarget& target,
                                         const uint8_t* message, const Section& section,
                                         const Landings& to) {
    const auto* vectors = reinterpret_cast<const uint4*>(message + view.row_offset);
    const int count = to.count;
#pragma unroll 1
    for (int i = section.row_begin + static_cast<int>(threadIdx.x); i < section.row_end;
         i += kRowThreads) {
        const uint4 piece = vectors[i];
        uint4* const out = reinterpret_cast<uint4*>(target.x) + i;
#pragma unroll 1
        for (int k = 0; k < count; k += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(to.row + k);
            const uint32_t row[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                if (k + u < count) out[static_cast<int64_t>(row[u]) * view.row_vectors] = piece;
            }
        }
    }
}
__device__ __forceinline__ void copy_scales(const View& view, const RecvTarget& target,
                                            const uint8_t* message, const Landings& to) {
    constexpr int U = 2;  // words of a lane
    const auto* scales = reinterpret_cast<const uint32_t*>(message + view.scales_offset);
    const bool as_ue8m0 = target.scales.ue8m0;
    const int words = as_ue8m0 ? (view.num_scales + 3) / 4 : view.num_scales;
    const int count = to.count;
#pragma unroll 1
    for (int g = threadIdx.x & 31; g < words; g += 32 * U) {
        uint32_t word[U];
        int at[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = min(g + 32 * u, words - 1);
            word[u] = scale_word(scales, i, view.num_scales, as_ue8m0);
            at[u] = i * target.scales.group_stride;
        }
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
            uint32_t* const out = target.scales.words + to.first_scale[k];
#pragma unroll
            for (int u = 0; u < U; ++u) out[at[u]] = word[u];
        }
    }
}

// Compact: rows past the last message choose no expert. CTA `index` of the `ctas` that do it.
__device__ inline void clear_unused_rows(const View& view, const RecvTarget& target,
                                         RecvScratch scratch, int index, int ctas) {
    const int num_messages = messages_before(view.num_ranks, scratch);
    const int topk = view.topk;
    const int64_t end = static_cast<int64_t>(view.max_messages) * topk;
    const int64_t step = static_cast<int64_t>(ctas) * kThreads;
    int64_t i = static_cast<int64_t>(num_messages) * topk + index * kThreads + threadIdx.x;
#pragma unroll 1
    for (; i < end; i += step) target.topk_idx[i] = -1;
}

// CTA 0, when its clerk has `ok`: what came, to the caller and to the statistics. False: gave up.
__device__ __forceinline__ bool keep_books(const View& view, const RecvTarget& target,
                                           const Turn& turn, RecvScratch scratch, bool ok) {
    // A first look, while others wait.
    uint32_t& readers = view.state->dispatch_readers;
    const bool advances = this_warp() == kClerk;
    const bool have_read = advances && all_have_read(readers);
    if (!all_found(ok, scratch)) return false;
    if (advances) advance(view.state->dispatched, readers, turn.epoch, have_read);
    report_counts(view, target, turn, scratch);
    return true;
}

// The other CTAs: the rows, in parts of messages. `ok`: the clerk's counts are there. False: gave
// up.
__device__ __forceinline__ bool receive_rows(const View& view, const RecvTarget& target,
                                             const Turn& turn, RecvScratch scratch, int bits,
                                             bool ok) {
    const int warp = this_warp();
    const auto* message = reinterpret_cast<const uint8_t*>(scratch.message);
    const Landings& to = *scratch.landings;
    const bool few = gridDim.x <= kFewCtas << bits;
    Watch watch{view, Op::kDispatch};
    // From the last CTA on: the first have tokens to send.
    int index = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    bool counted = false;
#pragma unroll 1
    while (true) {
        const InboxItem item = InboxItem::of(view, index, bits);
        const Section section = Section::of(view, item.part, bits);
        Placed placed{};
        if (warp == kRouter) {
            ok = find_places(view, target, watch, item, turn.epoch, counted, scratch, placed);
        } else if (warp != kClerk && item.slot < view.max_tokens) {
            ok =
                pull_slot<2, kRowThreads>(view, watch, item, section.begin, section.end, turn.epoch,
                                          few, scratch, scratch.message) != Pulled::kGaveUp;
        }
        counted = true;
        if (!all_found(ok, scratch)) return false;
        if (warp < kClerk) {
            copy_row(view, target, message, section, to);
        } else if (item.part == 0 && to.count != Landings::kNothing) {
            if (warp == kClerk) copy_scales(view, target, message, to);
            if (warp == kRouter) note_rows(view, target, item, scratch.head, placed);
        }
        index += static_cast<int>(gridDim.x) - 1;
        if (index >= to.end) return true;
        __syncthreads();  // the message's place and the landings are free again
    }
}

// All warps of every CTA, behind prepare_recv: they know the epoch (watch.cuh).
__device__ __forceinline__ void report_dispatch_reader(const View& view, const Turn& turn,
                                                       RecvScratch scratch) {
    const bool speaks = (threadIdx.x & 31) == 0;
    if (this_warp() == kRouter) {
        ptx::await_phase(&scratch.waits->readers, 0);
        if (speaks) atomicAdd(&view.state->dispatch_readers, 1u);
    } else {
        ptx::keep(static_cast<int32_t>(turn.epoch));
        __syncwarp();
        if (speaks) ptx::arrive(&scratch.waits->readers);
    }
}

// The whole grid, at least two CTAs, behind prepare_recv. Messages are received in 2^`bits` parts.
__device__ __forceinline__ void dispatch_recv(const View& view, const RecvTarget& target,
                                              const Turn& turn, RecvScratch scratch, int bits) {
    report_dispatch_reader(view, turn, scratch);
    bool ok = true;
    if (blockIdx.x == 0 && this_warp() == kRouter) measure_waits(view, target, turn);
    if (this_warp() == kClerk) {
        ok = pull_counts<4>(view, turn, 0, 1, scratch);
        if (target.format == Format::kContiguous) place_experts(view, target, scratch);
        if (blockIdx.x != 0) {
            const int end = most_messages(view, scratch) * view.num_ranks << bits;
            if ((threadIdx.x & 31) == 0) scratch.landings->end = ok ? end : Landings::kNoCounts;
            ptx::arrive(&scratch.waits->counts);
        }
    }
    if (blockIdx.x != 0) {
        receive_rows(view, target, turn, scratch, bits, ok);
    } else if (keep_books(view, target, turn, scratch, ok)) {
        if (target.format == Format::kCompact) clear_unused_rows(view, target, scratch, 0, 1);
    }
}

}  // namespace ep

// Dispatch, second half, where a CTA has several messages: each goes to a team of its warps.
//
// A CTA that takes message by message (dispatch_recv.cuh) meets twice for each, and every warp
// works out the message's rows. A warp of a team meets nobody: it reads the message's head, then
// copies pieces of it. With many messages a team is one warp.
#pragma once

#include "cuda/dispatch_recv.cuh"

namespace ep {

inline constexpr int kPieceLoads = 4;  // vectors of a lane
inline constexpr int kPieceVectors = 32 * kPieceLoads;
inline constexpr int kPieceBytes = kPieceVectors / kVectorsPerLine * kLinePayload;
static_assert(kPieceBytes % 16 == 0);
// So that a warp's stores begin at lines of the row wherever a piece begins.
static_assert(kPieceBytes / 16 + kVectorsPerLine - 1 <= kPieceVectors);

// A warp's shared memory: the head of a message | one of its pieces, tags taken out.
struct WarpScratch {
    uint64_t* head;
    uint64_t* piece;

    static constexpr int kBytes = kHeadBytes + kPieceBytes;
    static constexpr int kRoom = kThreads / 32 * kBytes;

    static __device__ __forceinline__ WarpScratch of(RecvScratch scratch, int warp) {
        auto* bytes = reinterpret_cast<uint8_t*>(scratch.message) + warp * kBytes;
        return {reinterpret_cast<uint64_t*>(bytes),
                reinterpret_cast<uint64_t*>(bytes + kHeadBytes)};
    }
};

// Who works on what: every CTA but the first has `teams` of `warps` warps.
struct Teams {
    int warps;
    int teams;

    // Enough teams for all messages at once, if there are so many warps.
    static __device__ __forceinline__ Teams of(const View& view, int messages, int ctas) {
        constexpr int kWarps = kThreads / 32;
        const int pieces = (view.message_vectors + kPieceVectors - 1) / kPieceVectors;
        const int each = max(1, (messages + ctas - 1) / ctas);
        const int warps = max(1, min(pieces, kWarps / each));
        return {warps, kWarps / warps};
    }
};

// The scales among the piece that begins `begin` bytes into the message, to every row. One warp.
__device__ __forceinline__ void copy_piece_scales(const View& view, const RecvTarget& target,
                                                  const uint8_t* piece, int begin,
                                                  const Placed& placed) {
    const bool as_ue8m0 = target.scales.ue8m0;
    const int words = as_ue8m0 ? (view.num_scales + 3) / 4 : view.num_scales;
    const int ahead = begin - view.scales_offset;
    const int first = max(0, ahead / 4);
    // (Packed scales are FP8's, which lie in the first piece.)
    const int end = min(words, (ahead + kPieceBytes) / 4);
    const auto* scales = reinterpret_cast<const uint32_t*>(piece - ahead);
#pragma unroll 1
    for (int base = first; base < end; base += 32) {
        const int g = base + static_cast<int>(threadIdx.x & 31);
        const uint32_t word = g < end ? scale_word(scales, g, view.num_scales, as_ue8m0) : 0;
        uint32_t* to = target.scales.words + g * target.scales.group_stride;
#pragma unroll 1
        for (unsigned left = placed.has_row; left != 0; left &= left - 1) {
            const int row = __shfl_sync(kFullWarp, placed.first_scale, __ffs(left) - 1);
            if (g < end) to[row] = word;
        }
    }
}

// What a piece holds of the row, to every place the row has here. One warp.
__device__ __forceinline__ void copy_piece(const View& view, const RecvTarget& target,
                                           const uint8_t* piece, int begin, const Placed& placed) {
    const int lane = threadIdx.x & 31;
    const int first = (begin - view.row_offset) >> 4;  // vector of the row; negative: not of it
    const int line = first & ~(kVectorsPerLine - 1);
    const auto* vectors = reinterpret_cast<const uint4*>(piece);
    uint4 v[kPieceLoads];
    bool mine[kPieceLoads];
#pragma unroll
    for (int u = 0; u < kPieceLoads; ++u) {
        const int i = line + 32 * u + lane;
        const int j = i - first;
        mine[u] = j >= 0 && j < kPieceBytes / 16 && i >= 0 && i < view.row_vectors;
        v[u] = mine[u] ? vectors[j] : uint4{};
    }
    uint4* const x = reinterpret_cast<uint4*>(target.x) + line + lane;
#pragma unroll 1
    for (unsigned left = placed.has_row; left != 0; left &= left - 1) {
        const int to = __shfl_sync(kFullWarp, placed.row, __ffs(left) - 1);
        uint4* const at = x + static_cast<int64_t>(to) * view.row_vectors;
#pragma unroll
        for (int u = 0; u < kPieceLoads; ++u) {
            if (mine[u]) at[32 * u] = v[u];
        }
    }
    if (begin < view.scales_offset + 4 * view.num_scales) {
        copy_piece_scales(view, target, piece, begin, placed);
    }
}

// Warp `part` of a team of `warps`: pieces `part`, `part + warps`, ... of a message. False: gave
// up.
__device__ __forceinline__ bool receive_message(const View& view, const RecvTarget& target,
                                                Watch& watch, const InboxItem& item, uint64_t epoch,
                                                int part, int warps, RecvScratch scratch,
                                                WarpScratch own) {
    const int num_vectors = view.message_vectors, source = item.source;
    const uint8_t* from = slot_address(view, source, item.slot, epoch);
    Look<1, 32> head;
    Look<kPieceLoads, 32> piece;
    int base = part * kPieceVectors;
    head.load(from, 0, num_vectors);
    piece.load(from, base, num_vectors);
    if (!await_look(watch, head, from, 0, num_vectors, source, epoch)) return false;
    head.lay_out(0, num_vectors, own.head);
    __syncwarp();
    const Placed placed = place_message(view, target, item, own.head, scratch);
#pragma unroll 1
    while (base < num_vectors) {
        if (!await_look(watch, piece, from, base, num_vectors, source, epoch)) return false;
        piece.lay_out(base, num_vectors, own.piece - first_granule(base));
        __syncwarp();
        const int begin = base / kVectorsPerLine * kLinePayload;
        base += warps * kPieceVectors;
        if (base < num_vectors) piece.load(from, base, num_vectors);
        copy_piece(view, target, reinterpret_cast<const uint8_t*>(own.piece), begin, placed);
        __syncwarp();  // the piece's place is free again
    }
    if (part == 0) note_rows(view, target, item, own.head, placed);
    __syncwarp();  // and the head's
    return true;
}

// CTAs `first` and on, once all counts are known: the rows. False in warps that gave up.
__device__ __forceinline__ bool receive_in_teams(const View& view, const RecvTarget& target,
                                                 const Turn& turn, RecvScratch scratch, int first) {
    const int ctas = static_cast<int>(gridDim.x) - first;
    const int messages = most_messages(view, scratch) * view.num_ranks;
    const Teams plan = Teams::of(view, messages, ctas);
    const int team = this_warp() / plan.warps;
    const int part = this_warp() - team * plan.warps;
    const int step = plan.teams * ctas;
    const WarpScratch own = WarpScratch::of(scratch, this_warp());
    Watch watch{view, Op::kDispatch};
    int index = team < plan.teams ? static_cast<int>(blockIdx.x) - first + team * ctas : messages;
#pragma unroll 1
    for (; index < messages; index += step) {
        const InboxItem item = InboxItem::of(view, index, 0);
        if (item.slot >= scratch.announced[item.source]) continue;
        if (!receive_message(view, target, watch, item, turn.epoch, part, plan.warps, scratch,
                             own)) {
            return false;
        }
    }
    return true;
}

// The whole grid, behind prepare_recv. CTAs between the first and number `first_receiver` only
// report.
__device__ __forceinline__ void dispatch_recv_teams(const View& view, const RecvTarget& target,
                                                    const Turn& turn, RecvScratch scratch,
                                                    int first_receiver) {
    report_dispatch_reader(view, turn, scratch);
    const bool keeps_books = blockIdx.x == 0;
    const int receiver = static_cast<int>(blockIdx.x) - first_receiver;
    if (!keeps_books && receiver < 0) return;
    bool ok = true;
    if (this_warp() != kRouter) {
        ok = pull_counts<1>(view, turn, this_warp(), kRouter, scratch);
    } else if (keeps_books) {
        measure_waits(view, target, turn);
    }
    if (target.format == Format::kContiguous) {
        __syncthreads();
        if (this_warp() == kClerk) place_experts(view, target, scratch);
    }
    if (keeps_books) {
        ok = keep_books(view, target, turn, scratch, ok);
    } else {
        ok =
            all_found(ok, scratch) && receive_in_teams(view, target, turn, scratch, first_receiver);
    }
    if (ok && target.format == Format::kCompact) {
        clear_unused_rows(view, target, scratch, max(0, receiver + 1),
                          static_cast<int>(gridDim.x) - first_receiver + 1);
    }
}

}  // namespace ep

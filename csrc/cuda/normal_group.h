// Normal operations as the launcher sees them: what a kernel knows of a rank, arguments, sizes.
//
// Launch contract of dispatch and combine: one CTA an SM, with the shared memory below. A CTA waits
// for peers, never for another CTA of its kernel; but a combine's waits for rows that any CTA of a
// peer's may send, so that those of all ranks must come to run whatever else waits on their GPUs:
// what waits at the same time may not ask for more SMs than there are. Every kernel may be launched
// with programmatic dependent launch: it touches no global memory before await_previous_kernel().
#pragma once

#include "cuda/view.h"
#include "ep/normal_tensors.h"

namespace ep::normal {

// Waits and faults are those of the low-latency kernels: `waits` has the fields that watch.cuh
// reads, with control heaps where heaps are.
struct Group {
    View waits;
    ControlLayout control;
    State* state;
    int64_t data_bytes;  // of every data heap
    uint8_t* data[kMaxRanks];

    EP_HD int num_ranks() const { return waits.num_ranks; }
    EP_HD int rank() const { return waits.rank; }
    // In `owner`'s control heap, the words of rank `source`.
    EP_HD uint8_t* notify_slot(int owner, uint64_t epoch, int source) const {
        const int64_t slot = static_cast<int64_t>(epoch & 1) * num_ranks() + source;
        return waits.peer[owner] + control.notify_offset + slot * control.notify_stride;
    }
    EP_HD Credit* credit(int64_t offset, int owner, int source) const {
        return reinterpret_cast<Credit*>(waits.peer[owner] + offset + source * kLine);
    }
    EP_HD uint64_t* done(int owner, int source) const {
        return reinterpret_cast<uint64_t*>(waits.peer[owner] + control.done_offset +
                                           source * kLine);
    }
    EP_HD uint64_t* chunk(int owner, int source, int index) const {
        return reinterpret_cast<uint64_t*>(waits.peer[owner] + control.chunk_offset) +
               source * kNumChunks + index;
    }

    static Group make(int num_ranks, int rank, int max_experts, const uintptr_t* control_heaps,
                      const uintptr_t* data_heaps, int64_t data_bytes, uintptr_t local,
                      uintptr_t faults, const Part& part = {}) {
        Group g{};
        g.data_bytes = data_bytes;
        g.control = ControlLayout::make(num_ranks, max_experts, part.control_start);
        g.state = reinterpret_cast<State*>(local);
        g.waits.num_ranks = num_ranks;
        g.waits.rank = rank;
        g.waits.names = part.names;
        g.waits.num_experts = max_experts;
        g.waits.budget_ns = &g.state->budget_ns;
        State* first = g.state - part.index;  // of the rank's parts
        g.waits.fault_claim = &first->fault_claim;
        g.waits.dropped_entries = &first->dropped_entries;
        g.waits.faults = reinterpret_cast<FaultBoard*>(faults);
        for (int r = 0; r < num_ranks; ++r) {
            g.waits.peer[r] = reinterpret_cast<uint8_t*>(control_heaps[r]);
            g.data[r] = reinterpret_cast<uint8_t*>(data_heaps[r]);
        }
        return g;
    }
};

// Words among State::tickets: CTAs of a kernel that have ended, and items that its warps have
// taken.
enum Ticket {
    kLayoutTicket,
    kDispatchTicket,
    kCombineTicket,
    kDispatchTokens,
    kCombineChunks,
    kCombineTokens,
    kNumTickets
};

// Ranks to a lane where lanes stand for ranks.
inline constexpr int kRounds = static_cast<int>(ceil_div(kMaxRanks, 32));

// Rows travel in pieces of equal size, but for the last.
struct Pieces {
    int32_t count;
    int32_t bytes;
    int32_t last;  // bytes of the last

    EP_HD int bytes_of(int piece) const { return piece + 1 < count ? bytes : last; }
    // As even as whole lines allow: the copy engine is slower where addresses in shared and global
    // memory do not agree within a line;
    static Pieces make(int64_t row_bytes, int stage_bytes) {
        const int64_t count = ceil_div(row_bytes, stage_bytes);
        return of(row_bytes, round_up(ceil_div(row_bytes, count), kLine));
    }
    // or of so many bytes each.
    static Pieces of(int64_t row_bytes, int64_t bytes) {
        const int64_t count = ceil_div(row_bytes, bytes);
        return {static_cast<int32_t>(count), static_cast<int32_t>(bytes),
                static_cast<int32_t>(row_bytes - (count - 1) * bytes)};
    }
};

// Of a stage between a bulk load and bulk stores.
inline constexpr int kDispatchBytes = 7168;
inline constexpr int kCombineBytes = PackedPiece::kRawBytes;
inline constexpr int kCountThreads = 512;  // layout, notify: kThreads, as lines want it

// With many SMs few bytes of each keep the link busy. Then one or two warps of each send: what a
// warp holds but has not sent yet is what others, when they have nothing left, cannot take over.
inline constexpr int kFewSms = 16;
inline constexpr int kManySms = 64;
inline constexpr int kSendWarps = 4;
EP_HD constexpr int sending_warps(int ctas) {
    return ctas <= kFewSms ? kSendWarps : ctas <= kManySms ? 2 : 1;
}

// Dispatch: a few warps send rows, the others what goes beside them.
inline constexpr int kDescribeWarps = 4;
inline constexpr int kDispatchThreads = 32 * (kSendWarps + kDescribeWarps);
inline constexpr int kDispatchStages = 24;  // of the warps that send, together

// Combine: a few warps send, one announces what they have sent, the others add up.
inline constexpr int kReduceWarps = 11;
inline constexpr int kAnnouncer = kSendWarps;  // this warp; the reducing ones come behind it
inline constexpr int kFirstReducer = kAnnouncer + 1;
inline constexpr int kCombineThreads = 32 * (kFirstReducer + kReduceWarps);
inline constexpr int kCombineStages = 16;  // of the warps that send, together
inline constexpr int kReduceBytes = 2048;  // of a stage that a reducing warp adds from
inline constexpr int kReduceStages = 4;

// Rows are packed where there are SMs to do it: fewer are busy enough with the sums. Half of the
// stages are then for what goes out. Packing takes a warp 0.6 us a part, so with fewer SMs more
// warps of each.
inline constexpr int kPackSms = 32;
inline constexpr int kMostSms = 112;
EP_HD constexpr bool packs_rows(int ctas, int64_t row_bytes) {
    return ctas >= kPackSms && row_bytes % PackedPiece::kRawPart == 0;
}
EP_HD constexpr int packing_warps(int ctas) {
    return ctas < kManySms ? kSendWarps : ctas < kMostSms ? 2 : 1;
}
static_assert(kReduceBytes == PackedPiece::kRawPart);

// Scales travel four at a time where that is possible.
struct ScaleUnits {
    bool vectors;  // 16 bytes a unit, else 4
    int32_t count;  // of a row
    FastDiv by_count;

    static ScaleUnits make(const NormalRows& rows) {
        const bool vectors = rows.num_scales % 4 == 0 && rows.scale_stride_group == 1 &&
                             rows.scale_stride_token % 4 == 0 &&
                             reinterpret_cast<uintptr_t>(rows.scales) % 16 == 0;
        const int count = vectors ? rows.num_scales / 4 : rows.num_scales;
        return {vectors, count, FastDiv::by(static_cast<uint32_t>(count > 0 ? count : 1))};
    }
};

struct LayoutArgs {
    NormalRoutes routes;
    int32_t num_tokens;
    FastDiv by_local_experts;
    NormalLayout into;
    Group group;
};
struct NotifyArgs {
    NormalLayout layout;
    int32_t num_tokens;
    int32_t stretch;  // tokens of one CTA; CTA 0 has none
    int32_t local_experts;
    int32_t alignment;
    NormalTables tables;
    int32_t* recv_counts;
    int32_t* host_counts;  // nullptr: the host does not ask
    Group group;
};
struct DispatchArgs {
    NormalRows rows;
    NormalRoutes routes;
    NormalTables tables;
    Pieces pieces;
    ScaleUnits scales;
    FastDiv by_topk;
    int32_t local_experts;
    int64_t block_offset;
    int64_t block_rows;
    BlockSize size;
    Group group;

    EP_HD uint64_t terms() const {
        return pack_terms(rows.row_bytes, rows.num_scales, routes.topk,
                          local_experts * group.num_ranks());
    }
};
struct CombineArgs {
    NormalCombine work;
    NormalTables tables;
    Pieces pieces;  // as they are sent
    bool packs;
    int32_t senders;  // warps of a CTA
    Pieces parts;  // as they are added
    Group group;

    // Of a kernel of so many CTAs.
    static CombineArgs make(const NormalCombine& work, const NormalTables& tables, int ctas,
                            const Group& group) {
        const int64_t row_bytes = 2LL * work.hidden;
        const bool packs = work.may_pack && packs_rows(ctas, row_bytes);
        return {.work = work,
                .tables = tables,
                .pieces = packs ? Pieces::of(row_bytes, kCombineBytes)
                                : Pieces::make(row_bytes, kCombineBytes),
                .packs = packs,
                .senders = packs ? packing_warps(ctas) : sending_warps(ctas),
                .parts = Pieces::make(row_bytes, kReduceBytes),
                .group = group};
    }
};

// Dynamic shared memory, in bytes.
inline constexpr int kMostScratchBytes = 227 << 10;  // that a CTA can have, of sm_90 on
EP_HD constexpr int layout_scratch_bytes(int num_ranks, int num_experts) {
    return 4 * (num_ranks + num_experts);
}
EP_HD constexpr int notify_scratch_bytes(int num_ranks, int local_experts) {
    return 4 * num_ranks * (num_ranks + local_experts);
}
int dispatch_scratch_bytes(int num_ranks);
int combine_scratch_bytes(int num_ranks);

using LayoutKernel = void (*)(LayoutArgs);
using NotifyKernel = void (*)(NotifyArgs);
using DispatchKernel = void (*)(DispatchArgs);
using CombineKernel = void (*)(CombineArgs);
LayoutKernel layout_kernel_ptr();
NotifyKernel notify_kernel_ptr();
DispatchKernel dispatch_kernel_ptr();
CombineKernel combine_kernel_ptr();

}  // namespace ep::normal

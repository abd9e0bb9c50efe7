// Dispatch: each row once to every rank that has one of its experts, straight to its final place.
//
// Rows go through the copy engine: into a stage of shared memory once, from there to each
// destination, lane d of the warp storing to rank d. What goes beside them: normal_describe.cuh.
// Each CTA tells every destination when its part has arrived.
#pragma once

#include "cuda/normal_describe.cuh"

namespace ep::normal {

struct DispatchScratch {
    uint8_t* stages;  // and their arrival words
    Target* targets;  // [R]
    int32_t* tokens;  // [kDescribeWarps][kStretch]

    static constexpr int kStageBytes = kDispatchStages * (kDispatchBytes + 8);
    static constexpr int kTokenBytes =
        kDescribeWarps * kStretch * static_cast<int>(sizeof(int32_t));

    static EP_HD constexpr int bytes(int num_ranks) {
        return kStageBytes + kTokenBytes + num_ranks * static_cast<int>(sizeof(Target));
    }
    static __device__ __forceinline__ DispatchScratch carve(uint8_t* smem) {
        uint8_t* behind = smem + kStageBytes;
        return {smem, reinterpret_cast<Target*>(behind + kTokenBytes),
                reinterpret_cast<int32_t*>(behind)};
    }
};
static_assert(DispatchScratch::bytes(kMaxRanks) <= kMostScratchBytes);

// The rows of one of kWarps sending warps: loads run ahead of the stores, tokens are claimed ahead
// of the loads.
template <int kWarps>
struct RowSender {
    static constexpr int kStages = kDispatchStages / kWarps;
    static constexpr int kAhead = kWarps == 2 ? 3 : 2;

    const DispatchArgs& a;
    Ring<kStages, kAhead, kDispatchBytes> ring;
    Claims claims;
    int32_t index = 0;  // of the claim that is being loaded
    int32_t token = 0;
    int32_t piece = 0;

    // Ready, with the first loads under way. They need nothing of peers.
    static __device__ __forceinline__ RowSender start(const DispatchArgs& a, uint8_t* stages) {
        RowSender s{a, {}, Claims::start(a.group, kDispatchTokens, warp_of(), kWarps)};
        s.ring = s.ring.carve(stages, warp_of(), kWarps);
        s.token = s.claims[0];
        s.claims.take();
        s.ring.init();
#pragma unroll 1
        for (int i = 0; i < kAhead; ++i) s.load_next();
        return s;
    }
    // A token that goes nowhere is loaded all the same: where it goes is not known yet.
    __device__ __forceinline__ void load_next() {
        if (token >= a.rows.num_tokens) return;
        ring.load(
            a.rows.x + token * a.rows.stride_bytes + static_cast<int64_t>(piece) * a.pieces.bytes,
            a.pieces.bytes_of(piece));
        if (++piece < a.pieces.count) return;
        piece = 0;
        token = claims[++index];
        claims.take();
    }
    __device__ __forceinline__ Positions positions_of(int of) const {
        Positions found;
        found.load(a.tables.send_position, a.group.num_ranks(), of, a.rows.num_tokens);
        return found;
    }
    // Lane d's row in rank d's block, or -1. False: some had no room.
    __device__ __forceinline__ bool find_rows(const Target* targets, const Positions& positions,
                                              int64_t (&rows)[kRounds]) const {
        bool ok = true;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const int dst = lane_of() + 32 * j;
            rows[j] = -1;
            if (positions.at[j] < 0) continue;
            ok = find_row(a, targets[dst], dst, positions.at[j], rows[j]) && ok;
        }
        return ok;
    }
    // Whole warps: the next piece to wherever its token goes.
    __device__ __forceinline__ void store_piece(const Target* targets,
                                                const int64_t (&rows)[kRounds], int p) {
        const int64_t at = static_cast<int64_t>(p) * a.pieces.bytes;
        const auto num_bytes = static_cast<uint32_t>(a.pieces.bytes_of(p));
        const uint8_t* stage = ring.await();
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            if (rows[j] < 0) continue;
            uint8_t* x = targets[lane_of() + 32 * j].x;
            ptx::start_store(x + rows[j] * a.rows.row_bytes + at, stage, num_bytes);
        }
        ptx::commit_stores();
    }
    // Returns when all it stored has arrived. False: gave up.
    __device__ __forceinline__ bool send(const Target* targets) {
        ptx::fence_async();  // peers' credits, acquired before, come before the stores
        bool ok = true;
        int64_t rows[kRounds];
        int now = claims[0];
        Positions positions = positions_of(now);
#pragma unroll 1
        for (int i = 1; now < a.rows.num_tokens; ++i) {
            ok = find_rows(targets, positions, rows) && ok;
            now = claims[i];
            positions = positions_of(now);  // on their way while this token's pieces go
#pragma unroll 1
            for (int p = 0; p < a.pieces.count; ++p) {
                ptx::await_stores_read<kStages - kAhead - 1>();
                __syncwarp();
                load_next();
                store_piece(targets, rows, p);
            }
        }
        ptx::await_stores<0>();
        return __any_sync(kFullWarp, !ok) == 0;
    }
};

// One warp: where everybody's blocks are. False: gave up.
__device__ __forceinline__ bool find_targets(const DispatchArgs& a, uint64_t epoch,
                                             Target* targets) {
    const Group& group = a.group;
    const int num_ranks = group.num_ranks(), me = group.rank();
    Watch watch{group.waits, Op::kNormalDispatch};
#pragma unroll 1
    for (int base = 0; base < num_ranks; base += 16) {
        const int r = base + lane_of() / 2;  // two lanes to a credit
        const Credit* credit =
            r < num_ranks ? group.credit(group.control.dispatch_credit_offset, me, r) : nullptr;
        int64_t first = 0, announced = 0;  // looked up while the credit is on its way
        if (credit != nullptr) {
            first = tokens_before(a.tables.rank_prefix, num_ranks, me, r);
            announced = first + tokens_between(a.tables.rank_prefix, num_ranks, me, r);
        }
        Credit found{};
        if (!await_credits(watch, credit, r, epoch, found)) return false;
        bool ok = true;
        if (credit != nullptr && (lane_of() & 1) == 0) {
            const int64_t rows = min(found.rows, group.data_bytes);
            const auto layout =
                BlockLayout::make(rows, a.rows.row_bytes, a.rows.num_scales, a.routes.topk);
            ok = check_credit(group, Op::kNormalDispatch, r, found, layout.bytes, a.terms());
            uint8_t* block = group.data[r] + found.offset;
            targets[r] = {block, block + layout.x, rows, first, min(announced, rows)};
        }
        if (__any_sync(kFullWarp, !ok)) return false;
    }
    return true;
}

// Behind a barrier of the CTA: what it stored has arrived everywhere.
__device__ __forceinline__ void tell_done(const Group& group) {
    if (warp_of() != 0) return;
    const uint64_t share = done_share(blockIdx.x, gridDim.x);
#pragma unroll 1
    for (int r = lane_of(); r < group.num_ranks(); r += 32) {
        // Covers the whole CTA's stores, through that barrier; acquired in await_done by rank r.
        ptx::add_release_sys(group.done(r, group.rank()), share);
    }
}

// One warp of the last CTA: everybody's rows are here. False: gave up.
__device__ __forceinline__ bool await_done(const Group& group, uint64_t epoch) {
    Watch watch{group.waits, Op::kNormalDispatch};
#pragma unroll 1
    for (int base = 0; base < group.num_ranks(); base += 32) {
        const int s = base + lane_of();
        const uint64_t* word = s < group.num_ranks() ? group.done(group.rank(), s) : nullptr;
        if (!await_words(watch, word, s, done_word(epoch))) return false;
    }
    return true;
}

// One of kWarps sending warps. The whole CTA meets once, where the targets are known. False: gave
// up.
template <int kWarps>
__device__ __forceinline__ bool send_part(const DispatchArgs& a, const DispatchScratch& scratch) {
    if (warp_of() >= kWarps) return __syncthreads_or(0) == 0;
    auto sender = RowSender<kWarps>::start(a, scratch.stages);
    const bool found = __syncthreads_or(0) == 0;
    const bool ok = found && sender.send(scratch.targets);
    sender.ring.drain();
    return ok;
}
__device__ __forceinline__ bool send_part(const DispatchArgs& a, const DispatchScratch& scratch) {
    const int warps = sending_warps(static_cast<int>(gridDim.x));
    if (warps == 1) return send_part<1>(a, scratch);
    if (warps == 2) return send_part<2>(a, scratch);
    return send_part<kSendWarps>(a, scratch);
}

// The other warps; one of them tells and learns where blocks are. False: gave up.
__device__ __forceinline__ bool describe_part(const DispatchArgs& a, uint64_t epoch,
                                              const DispatchScratch& scratch) {
    bool ok = true;
    if (warp_of() == kSendWarps) ok = find_targets(a, epoch, scratch.targets);
    if (__syncthreads_or(!ok) != 0) return false;
    ok = describe(a, scratch.targets, scratch.tokens);
    if (a.size == BlockSize::kPadded) pad_block(a);
    return ok;
}

// Whole CTAs: more rows come to some rank than its block holds. All ranks find the same.
__device__ __forceinline__ bool too_many(const DispatchArgs& a) {
    const int num_ranks = a.group.num_ranks();
    bool more = false;
    for (int r = static_cast<int>(threadIdx.x); r < num_ranks; r += kDispatchThreads) {
        more |= tokens_to(a.tables.rank_prefix, num_ranks, r) > a.block_rows;
    }
    return __syncthreads_or(more) != 0;
}

// The whole grid.
__device__ __forceinline__ void dispatch(const DispatchArgs& a, uint8_t* smem) {
    ptx::await_previous_kernel();
    if (a.size == BlockSize::kAhead && too_many(a)) return;
    const Group& group = a.group;
    const DispatchScratch scratch = DispatchScratch::carve(smem);
    const uint64_t epoch = group.state->dispatched + 1;  // the last CTA moves it on
    if (blockIdx.x == 0 && warp_of() == kSendWarps) {
        publish_credit(group, group.control.dispatch_credit_offset,
                       {a.block_offset, a.block_rows, epoch, a.terms()});
    }
    bool ok = may_run(group, Op::kNormalDispatch);
    if (ok) {
        ok = warp_of() < kSendWarps ? send_part(a, scratch) : describe_part(a, epoch, scratch);
    }
    ok = __syncthreads_or(!ok) == 0;
    if (ok) tell_done(group);
    ptx::allow_next_kernel();  // not before: until then it would hold SMs that are not ours
    if (!finish(group, kDispatchTicket, {kDispatchTokens}, !ok) || warp_of() != 0) return;
    if (await_done(group, epoch) && threadIdx.x == 0) group.state->dispatched = epoch;
}

}  // namespace ep::normal

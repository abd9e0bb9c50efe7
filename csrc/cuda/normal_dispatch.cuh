// Dispatch: each row once to every rank that has one of its experts, straight to its final place.
//
// Rows go through the copy engine: into a stage of shared memory once, from there to each
// destination, lane d of the warp storing to rank d. What goes beside a row (scales, choices, its
// token) goes with ordinary stores. The last CTA says so to every destination when all has arrived.
#pragma once

#include "cuda/normal_steps.cuh"

namespace ep::normal {

using DispatchRing = Ring<kDispatchStages, kDispatchAhead>;

// A destination's block as this rank writes to it.
struct Target {
    uint8_t* block;
    int64_t rows;  // of the block
    int64_t first;  // this rank's first row
    int64_t end;  // behind its last, or the end of the block if that comes before
};

struct DispatchScratch {
    uint8_t* stages;  // and their arrival words
    Target* targets;  // [R]

    static EP_HD int bytes(int num_ranks) {
        return DispatchRing::bytes(kDispatchWarps) + num_ranks * static_cast<int>(sizeof(Target));
    }
    static __device__ __forceinline__ DispatchScratch carve(uint8_t* smem) {
        return {smem, reinterpret_cast<Target*>(smem + DispatchRing::bytes(kDispatchWarps))};
    }
};

// Lane d's index of a token among those that go to rank d, or -1; ranks 32 and on in later rounds.
struct Positions {
    int32_t at[kRounds];

    __device__ __forceinline__ void load(const int32_t* send_position, int num_ranks, int64_t token,
                                         int num_tokens) {
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const int r = lane_of() + 32 * j;
            at[j] = token < num_tokens && r < num_ranks ? send_position[token * num_ranks + r] : -1;
        }
    }
    __device__ __forceinline__ bool any() const {
        bool goes = false;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) goes = goes || at[j] >= 0;
        return __any_sync(kFullWarp, goes) != 0;
    }
};

// Goes through the pieces of a warp's tokens that go anywhere. Whole warps.
struct PieceCursor {
    int64_t token;
    int32_t piece = 0;
    Positions positions;

    __device__ __forceinline__ void start(const DispatchArgs& a) {
        token = static_cast<int64_t>(blockIdx.x) + static_cast<int64_t>(warp_of()) * gridDim.x;
        seek(a);
    }
    __device__ __forceinline__ bool valid(const DispatchArgs& a) const {
        return token < a.rows.num_tokens;
    }
    __device__ __forceinline__ void advance(const DispatchArgs& a) {
        if (++piece < a.pieces.count) return;
        piece = 0;
        token += static_cast<int64_t>(kDispatchWarps) * gridDim.x;
        seek(a);
    }

  private:
    __device__ __forceinline__ void seek(const DispatchArgs& a) {
#pragma unroll 1
        while (true) {
            positions.load(a.tables.send_position, a.group.num_ranks(), token, a.rows.num_tokens);
            if (!valid(a) || positions.any()) return;
            token += static_cast<int64_t>(kDispatchWarps) * gridDim.x;
        }
    }
};

// The lanes of a round that have a row, one after the other: f(destination, row).
template <class Visit>
__device__ __forceinline__ void for_each_target(const int64_t (&rows)[kRounds], Visit visit) {
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
        unsigned left = __ballot_sync(kFullWarp, rows[j] >= 0);
#pragma unroll 1
        while (left != 0) {
            const int lane = __ffs(left) - 1;
            left &= left - 1;
            visit(lane + 32 * j, __shfl_sync(kFullWarp, rows[j], lane));
        }
    }
}

// What goes beside a row: its scales, its choices in the destination's terms, its token.
__device__ __forceinline__ void describe_row(const DispatchArgs& a, const Target* targets,
                                             int64_t token, const int64_t (&rows)[kRounds]) {
    const int topk = a.routes.topk, lane = lane_of(), num_scales = a.rows.num_scales;
    const bool has_entry = lane < topk;
    const bool has_experts = a.routes.topk_idx != nullptr && has_entry;
    const bool has_weights = a.routes.weights != nullptr && has_entry;
    const int64_t entry = token * topk + lane;
    const int64_t expert = has_experts ? a.routes.expert(entry) : -1;
    const float weight = has_weights ? a.routes.weights[entry] : 0.0f;
    const uint32_t* scales = a.rows.scales + token * a.rows.scale_stride_token;
    const uint32_t scale = lane < num_scales ? scales[lane * a.rows.scale_stride_group] : 0;
    for_each_target(rows, [&](int dst, int64_t row) {
        const Target target = targets[dst];
        const auto layout = BlockLayout::make(target.rows, a.rows.row_bytes, num_scales, topk);
        if (num_scales > 0) {
            auto* to = reinterpret_cast<uint32_t*>(target.block + layout.scales) + row * num_scales;
            if (lane < num_scales) to[lane] = scale;
#pragma unroll 4
            for (int g = lane + 32; g < num_scales; g += 32) {
                to[g] = scales[g * a.rows.scale_stride_group];
            }
        }
        const int64_t local = expert - static_cast<int64_t>(dst) * a.local_experts;
        const bool there = local >= 0 && local < a.local_experts;
        const int64_t at = row * topk + lane;
        if (has_experts) {
            reinterpret_cast<int64_t*>(target.block + layout.topk_idx)[at] = there ? local : -1;
        }
        if (has_weights) {
            const bool wanted = there || a.routes.topk_idx == nullptr;
            reinterpret_cast<float*>(target.block + layout.topk_weights)[at] =
                wanted ? weight : 0.0f;
        }
        if (lane == 0) {
            reinterpret_cast<int32_t*>(target.block + layout.source_token)[row] =
                static_cast<int32_t>(token);
        }
    });
}

// Lane d's row in rank d's block, or -1. False: a row lies behind the block, or behind what this
// rank announced; it is not written.
__device__ __forceinline__ bool find_rows(const DispatchArgs& a, const Target* targets,
                                          const Positions& positions, int64_t (&rows)[kRounds]) {
    bool ok = true;
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
        rows[j] = -1;
        if (positions.at[j] < 0) continue;
        const int dst = lane_of() + 32 * j;
        const int64_t row = targets[dst].first + positions.at[j];
        if (row < targets[dst].end) {
            rows[j] = row;
        } else {
            fail(a.group.waits, FaultCode::kCount, Op::kNormalDispatch, dst,
                 static_cast<uint64_t>(targets[dst].end), static_cast<uint64_t>(row) + 1);
            ok = false;
        }
    }
    return __any_sync(kFullWarp, !ok) == 0;
}

// Every warp: its tokens. Returns when all it stored has arrived. False: gave up.
__device__ __forceinline__ bool send_rows(const DispatchArgs& a, const DispatchScratch& scratch) {
    auto ring = DispatchRing::carve(scratch.stages, warp_of(), kDispatchWarps);
    ring.init();
    const auto load_next = [&](PieceCursor& next) {
        if (!next.valid(a)) return;
        const int64_t at = static_cast<int64_t>(next.piece) * a.pieces.bytes;
        ring.load(a.rows.x + next.token * a.rows.stride_bytes + at,
                  a.pieces.bytes_of(next.piece, a.rows.row_bytes));
        next.advance(a);
    };
    PieceCursor now;
    now.start(a);
    PieceCursor next = now;
#pragma unroll 1
    for (int i = 0; i < kDispatchAhead; ++i) load_next(next);
    bool ok = true;
    int64_t rows[kRounds] = {};
#pragma unroll 1
    while (now.valid(a)) {
        ptx::await_stores_read<DispatchRing::kBehind - 1>();
        __syncwarp();
        load_next(next);
        if (now.piece == 0) {
            ok = find_rows(a, scratch.targets, now.positions, rows) && ok;
            describe_row(a, scratch.targets, now.token, rows);
        }
        const uint8_t* piece = ring.await();
        const int64_t at = static_cast<int64_t>(now.piece) * a.pieces.bytes;
        const auto num_bytes =
            static_cast<uint32_t>(a.pieces.bytes_of(now.piece, a.rows.row_bytes));
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            if (rows[j] < 0) continue;
            uint8_t* block = scratch.targets[lane_of() + 32 * j].block;
            ptx::start_store(block + rows[j] * a.rows.row_bytes + at, piece, num_bytes);
        }
        ptx::commit_stores();
        now.advance(a);
    }
    ptx::await_stores<0>();
    return ok;
}

// Rows of this rank's block that nobody sends.
__device__ __forceinline__ void pad_block(const DispatchArgs& a) {
    const int num_ranks = a.group.num_ranks(), me = a.group.rank(), topk = a.routes.topk;
    const auto layout = BlockLayout::make(a.block_rows, a.rows.row_bytes, a.rows.num_scales, topk);
    uint8_t* block = a.group.data[me] + a.block_offset;
    auto* experts = reinterpret_cast<int64_t*>(block + layout.topk_idx);
    auto* weights = reinterpret_cast<float*>(block + layout.topk_weights);
    constexpr int kThreadsHere = 32 * kDispatchWarps;
    const int64_t first = a.tables.rank_prefix[(num_ranks - 1) * num_ranks + me];
#pragma unroll 1
    for (int64_t i = first * topk + static_cast<int64_t>(blockIdx.x) * kThreadsHere + threadIdx.x;
         i < a.block_rows * topk; i += static_cast<int64_t>(gridDim.x) * kThreadsHere) {
        experts[i] = -1;
        weights[i] = 0.0f;
    }
}

// One warp: where everybody's blocks are. False: gave up.
__device__ __forceinline__ bool find_targets(const DispatchArgs& a, uint64_t epoch,
                                             Target* targets) {
    const Group& group = a.group;
    const int num_ranks = group.num_ranks(), me = group.rank();
    Watch watch{group.waits, Op::kNormalDispatch};
#pragma unroll 1
    for (int base = 0; base < num_ranks; base += 32) {
        const int r = base + lane_of();
        const Credit* credit =
            r < num_ranks ? group.credit(group.control.dispatch_credit_offset, me, r) : nullptr;
        const uint64_t* word = credit == nullptr ? nullptr : &credit->epoch;
        if (!await_words(watch, word, r, epoch)) return false;
        bool ok = true;
        if (credit != nullptr) {
            const int64_t rows = min(credit->rows, group.data_bytes);
            const auto layout =
                BlockLayout::make(rows, a.rows.row_bytes, a.rows.num_scales, a.routes.topk);
            ok = check_credit(group, Op::kNormalDispatch, r, *credit, layout.bytes);
            const int64_t first = tokens_before(a.tables.rank_prefix, num_ranks, me, r);
            const int64_t end = first + tokens_between(a.tables.rank_prefix, num_ranks, me, r);
            targets[r] = {group.data[r] + credit->offset, rows, first, min(end, rows)};
        }
        if (__any_sync(kFullWarp, !ok)) return false;
    }
    return true;
}

// One warp of the last CTA: this rank's rows are everywhere; waits for the others'. False: gave up.
__device__ __forceinline__ bool exchange_done(const Group& group, uint64_t epoch) {
#pragma unroll 1
    for (int r = lane_of(); r < group.num_ranks(); r += 32) {
        ptx::store_release_sys(group.done(r, group.rank()), epoch);  // acquired below, by rank r
    }
    Watch watch{group.waits, Op::kNormalDispatch};
#pragma unroll 1
    for (int base = 0; base < group.num_ranks(); base += 32) {
        const int s = base + lane_of();
        const uint64_t* word = s < group.num_ranks() ? group.done(group.rank(), s) : nullptr;
        if (!await_words(watch, word, s, epoch)) return false;
    }
    return true;
}

// The whole grid.
__device__ __forceinline__ void dispatch(const DispatchArgs& a, uint8_t* smem) {
    const Group& group = a.group;
    const DispatchScratch scratch = DispatchScratch::carve(smem);
    const uint64_t epoch = group.state->dispatched + 1;  // the last CTA moves it on
    bool ok = may_run(group, Op::kNormalDispatch);
    if (ok) {
        if (warp_of() == 0) {
            if (blockIdx.x == 0) {
                publish_credit(group, group.control.dispatch_credit_offset,
                               {a.block_offset, a.block_rows, epoch});
            }
            __syncwarp();
            ok = find_targets(a, epoch, scratch.targets);
        }
        if (!a.exact) pad_block(a);
        ok = __syncthreads_or(!ok) == 0;
    }
    if (ok) ok = send_rows(a, scratch);
    if (!finish(group, kDispatchTicket, !ok) || warp_of() != 0) return;
    if (exchange_done(group, epoch) && threadIdx.x == 0) group.state->dispatched = epoch;
}

}  // namespace ep::normal

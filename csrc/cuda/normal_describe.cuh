// Dispatch, the describing warps: what goes beside the rows (scales, choices in the destination's
// terms, the source's token), for 32 tokens at a time, since the rows of tokens that follow each
// other follow each other at a destination: whole lines go over the link, not a few words a row.
#pragma once

#include "cuda/normal_steps.cuh"

namespace ep::normal {

inline constexpr int kStretch = 32;  // tokens

// A destination's block as this rank writes to it.
struct Target {
    uint8_t* block;
    uint8_t* x;  // its rows
    int64_t rows;  // of the block
    int64_t first;  // this rank's first row
    int64_t end;  // behind its last, or the end of the block if that comes before
};

// Where a token's row lies at its destination. False: behind the block, or behind what this rank
// announced, so that it is not written.
__device__ __forceinline__ bool find_row(const DispatchArgs& a, const Target& target, int dst,
                                         int32_t position, int64_t& row) {
    row = position < 0 ? -1 : target.first + position;
    if (row < target.end) return true;
    fail(a.group.waits, FaultCode::kCount, Op::kNormalDispatch, dst,
         static_cast<uint64_t>(target.end), static_cast<uint64_t>(row) + 1);
    row = -1;
    return false;
}

// One warp: `count` words at `to`. The loads of a batch are in flight together, and a warp stores
// whole 128-byte lines, wherever `to` starts.
template <class T, class Value>
__device__ __forceinline__ void fill(T* to, int count, Value value) {
    constexpr int kBatch = 8;
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(to) / sizeof(T) % 32);
#pragma unroll 1
    for (int base = lane_of() - skew; base < count; base += 32 * kBatch) {
        T words[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const int i = base + 32 * j;
            if (i >= 0 && i < count) words[j] = value(i);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const int i = base + 32 * j;
            if (i >= 0 && i < count) to[i] = words[j];
        }
    }
}

// One warp: beside `count` rows from `row` on, of the tokens listed.
__device__ __forceinline__ void describe_rows(const DispatchArgs& a, const Target& target, int dst,
                                              int64_t row, const int32_t* tokens, int count) {
    const int topk = a.routes.topk, num_scales = a.rows.num_scales;
    const auto layout = BlockLayout::make(target.rows, a.rows.row_bytes, num_scales, topk);
    uint8_t* scales = target.block + layout.scales + row * num_scales * 4;
    if (a.scales.vectors) {
        fill(reinterpret_cast<ptx::Vector*>(scales), count * a.scales.count, [&](int i) {
            const int r = a.scales.by_count(i), four = i - r * a.scales.count;
            const uint32_t* from = a.rows.scales + tokens[r] * a.rows.scale_stride_token;
            return reinterpret_cast<const ptx::Vector*>(from)[four];
        });
    } else {
        fill(reinterpret_cast<uint32_t*>(scales), count * a.scales.count, [&](int i) {
            const int r = a.scales.by_count(i), group = i - r * a.scales.count;
            return a.rows
                .scales[tokens[r] * a.rows.scale_stride_token + group * a.rows.scale_stride_group];
        });
    }
    const int64_t first_expert = static_cast<int64_t>(dst) * a.local_experts;
    const bool has_experts = a.routes.topk_idx != nullptr;
    const auto local_expert = [&](int64_t entry) {
        const int64_t local = a.routes.expert(entry) - first_expert;
        return local >= 0 && local < a.local_experts ? local : -1;
    };
    const auto entry_of = [&](int i) {
        const int r = a.by_topk(i);
        return static_cast<int64_t>(tokens[r]) * topk + i - r * topk;
    };
    if (topk > 0 && has_experts) {
        auto* to = reinterpret_cast<int64_t*>(target.block + layout.topk_idx) + row * topk;
        fill(to, count * topk, [&](int i) { return local_expert(entry_of(i)); });
    }
    if (topk > 0 && a.routes.weights != nullptr) {
        auto* to = reinterpret_cast<float*>(target.block + layout.topk_weights) + row * topk;
        fill(to, count * topk, [&](int i) {
            const int64_t entry = entry_of(i);
            const float weight = a.routes.weights[entry];
            return !has_experts || local_expert(entry) >= 0 ? weight : 0.0f;
        });
    }
    auto* to = reinterpret_cast<int32_t*>(target.block + layout.source_token) + row;
    const int32_t* names = a.rows.source_token;
    fill(to, count, [&](int i) { return names == nullptr ? tokens[i] : names[tokens[i]]; });
}

// One warp, with room for a stretch of tokens in shared memory. False: a row had no room.
__device__ __forceinline__ bool describe_stretch(const DispatchArgs& a, const Target& target,
                                                 int dst, int64_t first, int32_t* tokens) {
    const int num_ranks = a.group.num_ranks();
    const int64_t token = first + lane_of();
    const int position =
        token < a.rows.num_tokens ? a.tables.send_position[token * num_ranks + dst] : -1;
    int64_t row = -1;
    const bool ok = find_row(a, target, dst, position, row);
    unsigned left = __ballot_sync(kFullWarp, row >= 0);
    const unsigned before = (1u << lane_of()) - 1;
    if (row >= 0) tokens[__popc(left & before)] = static_cast<int32_t>(token);
    __syncwarp();
    // Rows of the whole group follow each other. Those that a node passes on come from several
    // sources: they do so from source to source only.
    int done = 0;
#pragma unroll 1
    while (left != 0) {
        const int64_t first_row = __shfl_sync(kFullWarp, row, __ffs(left) - 1);
        const bool mine = ((left >> lane_of()) & 1) != 0;
        const bool apart = mine && row != first_row + __popc(left & before);
        const unsigned breaks = __ballot_sync(kFullWarp, apart);
        const unsigned now = breaks == 0 ? left : left & ((1u << (__ffs(breaks) - 1)) - 1);
        describe_rows(a, target, dst, first_row, tokens + done, __popc(now));
        done += __popc(now);
        left &= ~now;
    }
    __syncwarp();
    return ok;
}

// The describing warps. False: gave up.
__device__ __forceinline__ bool describe(const DispatchArgs& a, const Target* targets,
                                         int32_t* tokens) {
    const int warp = warp_of() - kSendWarps, num_ranks = a.group.num_ranks();
    const int items = static_cast<int>(ceil_div(a.rows.num_tokens, kStretch)) * num_ranks;
    const auto ctas = static_cast<int>(gridDim.x);
    bool ok = true;
#pragma unroll 1
    for (int item = static_cast<int>(blockIdx.x) + warp * ctas; item < items;
         item += kDescribeWarps * ctas) {
        const int stretch = item / num_ranks, dst = item - stretch * num_ranks;
        ok = describe_stretch(a, targets[dst], dst, static_cast<int64_t>(stretch) * kStretch,
                              tokens + warp * kStretch) &&
             ok;
    }
    return __any_sync(kFullWarp, !ok) == 0;
}

// The describing warps: rows of this rank's block that nobody sends.
__device__ __forceinline__ void pad_block(const DispatchArgs& a) {
    const int num_ranks = a.group.num_ranks(), me = a.group.rank(), topk = a.routes.topk;
    const auto layout = BlockLayout::make(a.block_rows, a.rows.row_bytes, a.rows.num_scales, topk);
    uint8_t* block = a.group.data[me] + a.block_offset;
    auto* experts = reinterpret_cast<int64_t*>(block + layout.topk_idx);
    auto* weights = reinterpret_cast<float*>(block + layout.topk_weights);
    constexpr int kThreadsHere = 32 * kDescribeWarps;
    const int thread = static_cast<int>(threadIdx.x) - 32 * kSendWarps;
    const int64_t first = tokens_to(a.tables.rank_prefix, num_ranks, me);
#pragma unroll 1
    for (int64_t i = first * topk + static_cast<int64_t>(blockIdx.x) * kThreadsHere + thread;
         i < a.block_rows * topk; i += static_cast<int64_t>(gridDim.x) * kThreadsHere) {
        experts[i] = -1;
        weights[i] = 0.0f;
    }
}

}  // namespace ep::normal

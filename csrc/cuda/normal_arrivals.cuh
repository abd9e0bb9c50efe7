// Combine, the reducing warps: where a token's rows are, and when.
#pragma once

#include "cuda/normal_combine_send.cuh"

namespace ep::normal {

// One warp: where the rows of every rank lie.
__device__ __forceinline__ void find_arrivals(const CombineArgs& a, Arrival* arrivals) {
    const int num_ranks = a.group.num_ranks(), me = a.group.rank();
    const int32_t* prefix = a.tables.rank_prefix;
    int before = 0;
#pragma unroll 1
    for (int base = 0; base < num_ranks; base += 32) {
        const int d = base + lane_of();
        const int rows = d < num_ranks ? tokens_between(prefix, num_ranks, me, d) : 0;
        const int counted = d == me ? 0 : rows;
        int sum = counted;  // inclusive over the lanes
#pragma unroll
        for (int delta = 1; delta < 32; delta *= 2) {
            const int lower = __shfl_up_sync(kFullWarp, sum, delta);
            if (lane_of() >= delta) sum += lower;
        }
        const int in_inbox = before + sum - counted;
        const int first = d == me ? tokens_before(prefix, num_ranks, me, me) : in_inbox;
        if (d < num_ranks) arrivals[d] = {first, chunk_rows(rows)};
        before += __shfl_sync(kFullWarp, sum, 31);
    }
}

// A token's row at rank d, on d's lane: -1 where there is none.
struct Places {
    int64_t row[kRounds];
    uint32_t packed[kRounds];  // of a row in the inbox, bit i: piece i is packed

    // Waits until the rows are there. `packed_rows`: the inbox's. Whole warps; false: gave up.
    __device__ __forceinline__ bool find(const CombineArgs& a, const Arrival* arrivals,
                                         const uint32_t* packed_rows, Watch& watch,
                                         const Positions& positions, uint64_t epoch) {
        const Group& group = a.group;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const int d = lane_of() + 32 * j, position = positions.at[j];
            row[j] = -1;
            packed[j] = 0;
            if (32 * j >= group.num_ranks()) continue;
            const uint64_t* word = nullptr;
            if (position >= 0) {
                const Arrival from = arrivals[d];
                row[j] = static_cast<int64_t>(from.first) + position;
                if (d == group.rank()) {
                    row[j] = a.work.row(row[j]);
                } else {
                    word = group.chunk(group.rank(), d, position / from.per_chunk);
                }
            }
            uint64_t flags = kPackedRows;
            if (!await_words(watch, word, d, epoch, flags)) return false;
            if (flags != 0) packed[j] = packed_rows[row[j]] & PackedPiece::kBits;
        }
        return true;
    }
};

// Whole warps: takes the next lane with a row out of `left`, and its row; -1: none.
__device__ __forceinline__ int64_t next_row(unsigned& left, int64_t row, int& lane) {
    lane = left == 0 ? 0 : __ffs(left) - 1;
    const int64_t found = __shfl_sync(kFullWarp, row, lane);
    if (left == 0) return -1;
    left &= left - 1;
    return found;
}

// One warp: a token's top-k weights, summed over ranks.
__device__ __forceinline__ void reduce_weights(const CombineArgs& a, const float* inbox_weights,
                                               const Places& places, int64_t token) {
    const int topk = a.work.topk, lane = lane_of();
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
        unsigned left = __ballot_sync(kFullWarp, places.row[j] >= 0);
#pragma unroll 1
        while (left != 0) {
            int from = 0;
            const int64_t row = next_row(left, places.row[j], from);
            const float* given =
                from + 32 * j == a.group.rank() ? a.work.topk_weights : inbox_weights;
            if (lane < topk) sum += given[row * topk + lane];
        }
    }
    if (lane < topk) a.work.out_weights[token * topk + lane] = sum;
}

}  // namespace ep::normal

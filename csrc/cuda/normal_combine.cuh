// Combine: the sending warps (normal_combine_send.cuh), and the reducing warps, which add up each
// token's rows as their chunks arrive. FP32, ranks in order, rounded to BF16 once.
#pragma once

#include "cuda/combine.cuh"
#include "cuda/normal_combine_send.cuh"

namespace ep::normal {

inline constexpr int kInFlight = 4;  // vectors of a lane and row

// What rank d's lane knows about d's rows for this rank; ranks 32 and on in later rounds.
struct Arrivals {
    int32_t first[kRounds];  // in the inbox; of this rank itself: in x
    int32_t per_chunk[kRounds];

    __device__ __forceinline__ void find(const CombineArgs& a) {
        const int num_ranks = a.group.num_ranks(), me = a.group.rank();
        const int32_t* prefix = a.tables.rank_prefix;
        int before = 0;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const int d = lane_of() + 32 * j;
            const int rows = d < num_ranks ? tokens_between(prefix, num_ranks, me, d) : 0;
            const int counted = d == me ? 0 : rows;
            int sum = counted;  // inclusive over the lanes
#pragma unroll
            for (int delta = 1; delta < 32; delta *= 2) {
                const int lower = __shfl_up_sync(kFullWarp, sum, delta);
                if (lane_of() >= delta) sum += lower;
            }
            first[j] = d == me ? tokens_before(prefix, num_ranks, me, me) : before + sum - counted;
            per_chunk[j] = chunk_rows(rows);
            before += __shfl_sync(kFullWarp, sum, 31);
        }
        in_inbox = before;
    }
    int32_t in_inbox;  // rows of all ranks
};

// A token's row at rank d, on d's lane: -1 where there is none.
struct Places {
    int64_t row[kRounds];

    // Waits until the rows are there. Whole warps; false: gave up.
    __device__ __forceinline__ bool find(const CombineArgs& a, const Arrivals& arrivals,
                                         Watch& watch, int64_t token, uint64_t epoch) {
        const Group& group = a.group;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const int d = lane_of() + 32 * j;
            row[j] = -1;
            if (32 * j >= group.num_ranks()) continue;
            const int position =
                d < group.num_ranks() ? a.tables.send_position[token * group.num_ranks() + d] : -1;
            const uint64_t* word = nullptr;
            if (position >= 0) {
                row[j] = static_cast<int64_t>(arrivals.first[j]) + position;
                if (d != group.rank()) {
                    word = group.chunk(group.rank(), d, position / arrivals.per_chunk[j]);
                }
            }
            if (!await_words(watch, word, d, epoch)) return false;
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

// Adds one stretch of two rows; either may be nullptr.
__device__ __forceinline__ void add_rows(Sum8 (&sum)[kInFlight], const uint8_t* one,
                                         const uint8_t* two, int vector, int num_vectors) {
    ptx::Vector a[kInFlight] = {}, b[kInFlight] = {};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
        const int v = vector + 32 * u;
        if (one != nullptr && v < num_vectors) a[u] = reinterpret_cast<const ptx::Vector*>(one)[v];
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
        const int v = vector + 32 * u;
        if (two != nullptr && v < num_vectors) b[u] = reinterpret_cast<const ptx::Vector*>(two)[v];
    }
    // What was not loaded adds +0, which changes nothing: a sum begins as +0.
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) sum[u].add(1.0f, a[u]);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) sum[u].add(1.0f, b[u]);
}

__device__ __forceinline__ const uint8_t* row_of(const CombineArgs& a, const uint8_t* inbox,
                                                 int rank, int64_t row) {
    if (row < 0) return nullptr;
    return rank == a.group.rank() ? a.work.x + row * a.work.stride_bytes
                                  : inbox + row * 2 * a.work.hidden;
}

__device__ __forceinline__ const uint8_t* bias_of(const CombineArgs& a, int which, int64_t token) {
    const uint16_t* bias = a.work.bias[which];
    if (bias == nullptr) return nullptr;
    return reinterpret_cast<const uint8_t*>(bias + token * a.work.hidden);
}

// One warp: a token's row, out of the rows that are there.
__device__ __forceinline__ void reduce_token(const CombineArgs& a, const uint8_t* inbox,
                                             const Places& places, int64_t token) {
    const int num_vectors = a.work.hidden / 8;
    auto* out = reinterpret_cast<ptx::Vector*>(a.work.out + token * a.work.hidden);
    const uint8_t* bias[2] = {bias_of(a, 0, token), bias_of(a, 1, token)};
#pragma unroll 1
    for (int base = 0; base < num_vectors; base += 32 * kInFlight) {
        const int vector = base + lane_of();
        Sum8 sum[kInFlight];
        if (bias[0] != nullptr || bias[1] != nullptr) {
            add_rows(sum, bias[0], bias[1], vector, num_vectors);
        }
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            unsigned left = __ballot_sync(kFullWarp, places.row[j] >= 0);
#pragma unroll 1
            while (left != 0) {
                int one = 0, two = 0;
                const int64_t first = next_row(left, places.row[j], one);
                const int64_t second = next_row(left, places.row[j], two);
                add_rows(sum, row_of(a, inbox, one + 32 * j, first),
                         row_of(a, inbox, two + 32 * j, second), vector, num_vectors);
            }
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            if (vector + 32 * u < num_vectors) out[vector + 32 * u] = sum[u].vector();
        }
    }
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

// A reducing warp's tokens, in the order in which their rows are sent. False: gave up.
__device__ __forceinline__ bool reduce_tokens(const CombineArgs& a, uint64_t epoch) {
    const Group& group = a.group;
    const uint8_t* inbox = group.data[group.rank()] + a.work.inbox_offset;
    Arrivals arrivals;
    arrivals.find(a);
    const auto layout = InboxLayout::make(arrivals.in_inbox, a.work.hidden, a.work.topk);
    const auto* inbox_weights = reinterpret_cast<const float*>(inbox + layout.topk_weights);
    Watch watch{group.waits, Op::kNormalCombine};
    const int warp = warp_of() - kSendWarps;
#pragma unroll 1
    for (int64_t token = blockIdx.x + static_cast<int64_t>(warp) * gridDim.x;
         token < a.work.num_tokens; token += static_cast<int64_t>(kReduceWarps) * gridDim.x) {
        Places places;
        if (!places.find(a, arrivals, watch, token, epoch)) return false;
        reduce_token(a, inbox, places, token);
        if (a.work.out_weights != nullptr) reduce_weights(a, inbox_weights, places, token);
    }
    return true;
}

// The whole grid.
__device__ __forceinline__ void combine(const CombineArgs& a, uint8_t* smem) {
    const Group& group = a.group;
    const CombineScratch scratch = CombineScratch::carve(smem);
    const uint64_t epoch = group.state->combined + 1;  // the last CTA moves it on
    bool ok = may_run(group, Op::kNormalCombine);
    if (ok) {
        if (blockIdx.x == 0 && warp_of() == 0) {
            publish_credit(group, group.control.combine_credit_offset,
                           {a.work.inbox_offset, 0, epoch});
        }
        find_sources(a, scratch.sources);
        __syncthreads();
        ok = warp_of() < kSendWarps ? send_back(a, epoch, scratch) : reduce_tokens(a, epoch);
    }
    if (finish(group, kCombineTicket, !ok) && threadIdx.x == 0) group.state->combined = epoch;
}

}  // namespace ep::normal

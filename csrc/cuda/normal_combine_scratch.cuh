// Combine: what its warps share, and where each source's rows are.
#pragma once

#include "cuda/normal_announce.cuh"

namespace ep::normal {

using ReduceRing = CopyRing<kReduceStages, kReduceBytes>;

// Rows of a token, and biases. A layout alone, without topk_idx, may send it to every rank.
inline constexpr int kMostTerms = kMaxRanks + 2;

// Rows of one chunk, of `rows` from one rank to one source; the last chunks may have none.
EP_HD int chunk_rows(int rows) { return static_cast<int>(ceil_div(rows, kNumChunks)); }
EP_HD int num_chunks(int rows) { return static_cast<int>(ceil_div(rows, chunk_rows(rows))); }

// This rank's rows of one source.
struct Homeward {
    int32_t rows;
    int32_t first;   // in x
    int32_t to;      // in the source's inbox
    int32_t in_inbox;  // rows of that inbox, of all ranks
};

// A rank's rows for this one.
struct Arrival {
    int32_t first;  // in the inbox; of this rank itself: in x
    int32_t per_chunk;
};

// A piece in a stage of a sending warp.
struct Sent {
    int32_t source;
    int32_t row;  // among the source's
    int32_t piece;
    int32_t chunk;  // that it ends, or -1
};

struct CombineScratch {
    uint8_t* send_stages;  // and their arrival words
    uint8_t* slots;  // in their second half: what was packed
    uint8_t* reduce_stages;
    uintptr_t* terms;  // [kReduceWarps][kMostTerms]
    Sent* sent;  // [kCombineStages], beside the stages
    Outbox* outboxes;  // [kSendWarps]
    Homeward* sources;  // [R]
    Arrival* arrivals;  // [R]

    // The copy engine is slower where addresses in shared and global memory do not agree in a line.
    static constexpr int kSlots =
        static_cast<int>(round_up(kCombineStages / 2 * (kCombineBytes + 8), kLine));
    static constexpr int kReduce = kSlots + kCombineStages / 2 * kCombineBytes;
    static_assert(kReduce >= kCombineStages * (kCombineBytes + 8));
    static constexpr int kTerms = kReduce + ReduceRing::bytes(kReduceWarps);
    static constexpr int kSent = kTerms + kReduceWarps * kMostTerms * 8;
    static constexpr int kOutboxes = kSent + kCombineStages * static_cast<int>(sizeof(Sent));
    static constexpr int kSources = kOutboxes + kSendWarps * static_cast<int>(sizeof(Outbox));

    static EP_HD constexpr int bytes(int num_ranks) {
        return kSources + num_ranks * static_cast<int>(sizeof(Homeward) + sizeof(Arrival));
    }
    static __device__ __forceinline__ CombineScratch carve(uint8_t* smem, int num_ranks) {
        auto* sources = reinterpret_cast<Homeward*>(smem + kSources);
        return {smem,
                smem + kSlots,
                smem + kReduce,
                reinterpret_cast<uintptr_t*>(smem + kTerms),
                reinterpret_cast<Sent*>(smem + kSent),
                reinterpret_cast<Outbox*>(smem + kOutboxes),
                sources,
                reinterpret_cast<Arrival*>(sources + num_ranks)};
    }
};
static_assert(CombineScratch::bytes(kMaxRanks) <= kMostScratchBytes);

// Whole warps: tokens from `source` to ranks below `below`, itself not counted.
__device__ __forceinline__ int inbox_rows(const int32_t* rank_prefix, int num_ranks, int source,
                                          int below) {
    int rows = 0;
#pragma unroll 1
    for (int r = lane_of(); r < below; r += 32) {
        if (r != source) rows += tokens_between(rank_prefix, num_ranks, source, r);
    }
    return __reduce_add_sync(kFullWarp, rows);
}

// All warps, a source each.
__device__ __forceinline__ void find_sources(const CombineArgs& a, Homeward* sources) {
    const int num_ranks = a.group.num_ranks(), me = a.group.rank();
    const int32_t* prefix = a.tables.rank_prefix;
#pragma unroll 1
    for (int s = warp_of(); s < num_ranks; s += kCombineThreads / 32) {
        const int to = inbox_rows(prefix, num_ranks, s, me);
        const int in_inbox = inbox_rows(prefix, num_ranks, s, num_ranks);
        if (lane_of() == 0) {
            sources[s] = {tokens_between(prefix, num_ranks, s, me),
                          tokens_before(prefix, num_ranks, s, me), to, in_inbox};
        }
    }
}

}  // namespace ep::normal

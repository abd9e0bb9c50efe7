// Combine, the sending warps: rows go back to their sources, through the copy engine.
//
// A source's rows are cut into chunks; a warp sends a whole chunk and then tells the source. All
// sources' first chunks go out first, as the sources' reducing warps want them.
#pragma once

#include "cuda/normal_steps.cuh"

namespace ep::normal {

using CombineRing = Ring<kCombineStages, kCombineAhead>;

// Rows of one chunk, of `rows` from one rank to one source; the last chunks may have none.
EP_HD int chunk_rows(int rows) { return static_cast<int>(ceil_div(rows, kNumChunks)); }

// This rank's rows of one source.
struct Homeward {
    int32_t rows;
    int32_t first;   // in x
    int32_t to;      // in the source's inbox
    int32_t in_inbox;  // rows of that inbox, of all ranks
};

struct CombineScratch {
    uint8_t* stages;  // and their arrival words
    Homeward* sources;  // [R]

    static EP_HD int bytes(int num_ranks) {
        return CombineRing::bytes(kSendWarps) + num_ranks * static_cast<int>(sizeof(Homeward));
    }
    static __device__ __forceinline__ CombineScratch carve(uint8_t* smem) {
        return {smem, reinterpret_cast<Homeward*>(smem + CombineRing::bytes(kSendWarps))};
    }
};

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

// Goes through the pieces of the rows of a warp's chunks.
struct ChunkCursor {
    int32_t item;  // chunk by chunk; within a chunk, the other ranks from the next one on
    int32_t source = 0;
    int32_t chunk = 0;
    int32_t row = 0;  // among the source's
    int32_t end = 0;  // of the chunk
    int32_t piece = 0;

    __device__ __forceinline__ void start(const Group& group, const Homeward* sources) {
        item = static_cast<int32_t>(blockIdx.x) + warp_of() * static_cast<int32_t>(gridDim.x);
        seek(group, sources);
    }
    __device__ __forceinline__ bool valid(const Group& group) const {
        return item < kNumChunks * (group.num_ranks() - 1);
    }
    __device__ __forceinline__ bool starts_row() const { return piece == 0; }
    __device__ __forceinline__ bool ends_chunk(const CombineArgs& a) const {
        return row + 1 == end && piece + 1 == a.pieces.count;
    }
    __device__ __forceinline__ void advance(const CombineArgs& a, const Homeward* sources) {
        if (++piece < a.pieces.count) return;
        piece = 0;
        if (++row < end) return;
        item += kSendWarps * static_cast<int32_t>(gridDim.x);
        seek(a.group, sources);
    }

  private:
    // Sources with few rows leave their later chunks empty.
    __device__ __forceinline__ void seek(const Group& group, const Homeward* sources) {
        const int others = group.num_ranks() - 1;
#pragma unroll 1
        for (; valid(group); item += kSendWarps * static_cast<int32_t>(gridDim.x)) {
            chunk = item / others;
            source = group.rank() + 1 + item - chunk * others;
            if (source >= group.num_ranks()) source -= group.num_ranks();
            const int rows = sources[source].rows, per_chunk = chunk_rows(rows);
            row = chunk * per_chunk;
            end = min(rows, row + per_chunk);
            if (row < end) return;
        }
    }
};

// Chunks whose stores are on their way: the word to set when the piece that ended it has arrived.
struct Announcements {
    uint64_t* word[CombineRing::kBehind] = {};

    // Lane 0, when all pieces but the last kBehind - 1 have arrived.
    __device__ __forceinline__ void tell_oldest(uint64_t epoch) {
        if (word[0] != nullptr) ptx::store_release_sys(word[0], epoch);  // acquired by the reducers
#pragma unroll
        for (int i = 0; i + 1 < CombineRing::kBehind; ++i) word[i] = word[i + 1];
        word[CombineRing::kBehind - 1] = nullptr;
    }
};

// A warp's place in one source's inbox.
struct Inbox {
    int32_t source = -1;
    uint8_t* at = nullptr;

    // Waits for the source's credit. It cannot be of a later epoch: the source goes on only with
    // all rows, and some of them are this warp's. Whole warps; false: gave up.
    __device__ __forceinline__ bool open(const Group& group, Watch& watch, int s, int64_t bytes,
                                         uint64_t epoch) {
        if (s == source) return true;
        const Credit* credit = group.credit(group.control.combine_credit_offset, group.rank(), s);
        if (!await_words(watch, &credit->epoch, s, epoch)) return false;
        bool ok = true;
        if (lane_of() == 0) ok = check_credit(group, Op::kNormalCombine, s, *credit, bytes);
        if (__any_sync(kFullWarp, !ok)) return false;
        source = s;
        at = group.data[s] + credit->offset;
        ptx::fence_async();  // the copies that follow come after it too
        return true;
    }
};

__device__ __forceinline__ void send_weights(const CombineArgs& a, const Homeward& home,
                                             uint8_t* inbox, int row) {
    if (a.work.topk_weights == nullptr || lane_of() >= a.work.topk) return;
    const auto layout = InboxLayout::make(home.in_inbox, a.work.hidden, a.work.topk);
    const int64_t topk = a.work.topk;
    reinterpret_cast<float*>(inbox + layout.topk_weights)[(home.to + row) * topk + lane_of()] =
        a.work.topk_weights[(home.first + row) * topk + lane_of()];
}

// A sending warp's chunks. Returns when all has arrived. False: gave up.
__device__ __forceinline__ bool send_back(const CombineArgs& a, uint64_t epoch,
                                          const CombineScratch& scratch) {
    const Group& group = a.group;
    auto ring = CombineRing::carve(scratch.stages, warp_of(), kSendWarps);
    ring.init();
    const int64_t row_bytes = 2LL * a.work.hidden;
    const auto load_next = [&](ChunkCursor& next) {
        if (!next.valid(group)) return;
        const int64_t row = scratch.sources[next.source].first + next.row;
        ring.load(a.work.x + row * a.work.stride_bytes +
                      static_cast<int64_t>(next.piece) * a.pieces.bytes,
                  a.pieces.bytes_of(next.piece, row_bytes));
        next.advance(a, scratch.sources);
    };
    ChunkCursor now;
    now.start(group, scratch.sources);
    ChunkCursor next = now;
#pragma unroll 1
    for (int i = 0; i < kCombineAhead; ++i) load_next(next);
    Watch watch{group.waits, Op::kNormalCombine};
    Inbox inbox;
    Announcements announcements;
#pragma unroll 1
    while (now.valid(group)) {
        ptx::await_stores<CombineRing::kBehind - 1>();
        if (lane_of() == 0) announcements.tell_oldest(epoch);
        __syncwarp();
        load_next(next);
        const Homeward home = scratch.sources[now.source];
        const auto layout = InboxLayout::make(home.in_inbox, a.work.hidden, a.work.topk);
        if (!inbox.open(group, watch, now.source, layout.bytes, epoch)) break;
        if (now.starts_row()) send_weights(a, home, inbox.at, now.row);
        const uint8_t* piece = ring.await();
        if (lane_of() == 0) {
            ptx::start_store(inbox.at + (home.to + now.row) * row_bytes +
                                 static_cast<int64_t>(now.piece) * a.pieces.bytes,
                             piece, static_cast<uint32_t>(a.pieces.bytes_of(now.piece, row_bytes)));
            if (now.ends_chunk(a)) {
                announcements.word[CombineRing::kBehind - 1] =
                    group.chunk(now.source, group.rank(), now.chunk);
            }
        }
        ptx::commit_stores();
        now.advance(a, scratch.sources);
    }
    const bool ok = !now.valid(group);
    ring.drain();
    ptx::await_stores<0>();
    __syncwarp();
    if (lane_of() == 0) {
#pragma unroll
        for (int i = 0; i < CombineRing::kBehind; ++i) announcements.tell_oldest(epoch);
    }
    return ok;
}

}  // namespace ep::normal

// Combine, the sending warps: rows go back to their sources, through the copy engine.
//
// A source's rows are cut into chunks; a warp sends a whole chunk and then tells the source. All
// sources' first chunks go out first, as the sources' reducing warps want them.
#pragma once

#include "cuda/normal_announce.cuh"

namespace ep::normal {

using ReduceRing = CopyRing<kReduceStages, kReduceBytes>;

inline constexpr int kMostTerms = kMaxTopk + 2;  // rows of a token, and biases

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
    uint8_t* reduce_stages;
    const uint8_t** terms;  // [kReduceWarps][kMostTerms]
    Sent* sent;  // [kCombineStages], beside the stages
    Outbox* outboxes;  // [kSendWarps]
    Homeward* sources;  // [R]
    Arrival* arrivals;  // [R]

    static constexpr int kReduce = kCombineStages * (kSendBytes + 8);
    static constexpr int kTerms = kReduce + ReduceRing::bytes(kReduceWarps);
    static constexpr int kSent = kTerms + kReduceWarps * kMostTerms * 8;
    static constexpr int kOutboxes = kSent + kCombineStages * static_cast<int>(sizeof(Sent));
    static constexpr int kSources = kOutboxes + kSendWarps * static_cast<int>(sizeof(Outbox));

    static EP_HD int bytes(int num_ranks) {
        return kSources + num_ranks * static_cast<int>(sizeof(Homeward) + sizeof(Arrival));
    }
    static __device__ __forceinline__ CombineScratch carve(uint8_t* smem, int num_ranks) {
        auto* sources = reinterpret_cast<Homeward*>(smem + kSources);
        return {smem,
                smem + kReduce,
                reinterpret_cast<const uint8_t**>(smem + kTerms),
                reinterpret_cast<Sent*>(smem + kSent),
                reinterpret_cast<Outbox*>(smem + kOutboxes),
                sources,
                reinterpret_cast<Arrival*>(sources + num_ranks)};
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

// The sources' inboxes as a warp has found them so far; source s is on lane s % 32.
struct Inboxes {
    int64_t offset[kRounds] = {};  // in the source's data heap, and 1 more; 0: not known
    int32_t last = -1;  // the source that was asked for last, and its inbox: mostly it is next too
    uint8_t* at = nullptr;

    // Waits for the source's credit, the first time. It cannot be of a later epoch: the source goes
    // on only with all rows, and some of them are this warp's. Whole warps; nullptr: gave up.
    __device__ __forceinline__ uint8_t* open(const Group& group, Watch& watch, int source,
                                             int64_t bytes, uint64_t epoch) {
        if (source == last) return at;
        at = find(group, watch, source, bytes, epoch);
        last = source;
        return at;
    }
    __device__ __forceinline__ uint8_t* find(const Group& group, Watch& watch, int source,
                                             int64_t bytes, uint64_t epoch) {
        int64_t known = 0;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {  // values, not an index: registers have none
            const int64_t there = __shfl_sync(kFullWarp, offset[j], source % 32);
            if (source / 32 == j) known = there;
        }
        if (known != 0) return group.data[source] + known - 1;
        const Credit* credit =
            group.credit(group.control.combine_credit_offset, group.rank(), source);
        Credit found{};
        if (!await_credits(watch, credit, source, epoch, found)) return nullptr;
        bool ok = true;
        if (lane_of() == 0) ok = check_credit(group, Op::kNormalCombine, source, found, bytes);
        if (__any_sync(kFullWarp, !ok)) return nullptr;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            if (lane_of() + 32 * j == source) offset[j] = found.offset + 1;
        }
        ptx::fence_async();  // the copies that follow come after it too
        return group.data[source] + found.offset;
    }
};

__device__ __forceinline__ void send_weights(const CombineArgs& a, const Homeward& home,
                                             uint8_t* inbox, int row) {
    if (a.work.topk_weights == nullptr || lane_of() >= a.work.topk) return;
    const auto layout = InboxLayout::make(home.in_inbox, a.work.hidden, a.work.topk);
    const int64_t topk = a.work.topk;
    reinterpret_cast<float*>(inbox + layout.topk_weights)[(home.to + row) * topk + lane_of()] =
        a.work.topk_weights[a.work.row(home.first + row) * topk + lane_of()];
}

// The chunks of one of kWarps sending warps. Item by item: chunk by chunk; within a chunk, the
// other ranks from the next one on.
template <int kWarps>
struct ChunkSender {
    static constexpr int kStages = kCombineStages / kWarps;
    static constexpr int kAhead = kWarps == kSendWarps ? 2 : 3;  // more: held when others are done
    static constexpr int kLag = kWarps == 1 ? 1 : kWarps == 2 ? 3 : 4;  // pieces on their way

    const CombineArgs& a;
    const CombineScratch& scratch;
    Ring<kStages, kAhead, kSendBytes> ring;
    Sent* sent;  // beside the stages
    Claims claims;
    int32_t items = 0;
    int32_t index = 0;
    Sent next{-1, 0, 0, 0};  // chunk: the one being loaded; source -1: none is left
    int32_t end = 0;  // of its rows

    static __device__ __forceinline__ ChunkSender start(const CombineArgs& a,
                                                        const CombineScratch& scratch) {
        ChunkSender s{a,
                      scratch,
                      {},
                      scratch.sent + warp_of() * kStages,
                      Claims::start(a.group, kCombineChunks, warp_of(), kWarps)};
        s.ring = s.ring.carve(scratch.send_stages, warp_of(), kWarps);
        const int num_ranks = a.group.num_ranks();
        int chunks = 0;  // of any source
#pragma unroll 1
        for (int r = 0; r < num_ranks; ++r) {
            const int rows = r == a.group.rank() ? 0 : scratch.sources[r].rows;
            chunks = max(chunks, rows == 0 ? 0 : num_chunks(rows));
        }
        s.items = chunks * (num_ranks - 1);
        s.ring.init();
        s.seek();
#pragma unroll 1
        for (int i = 0; i < kAhead; ++i) s.load_next();
        s.claims.take();  // not before: the first loads would wait for the counter
        return s;
    }
    // To the next chunk with rows: sources with few rows have none of the later ones.
    __device__ __forceinline__ void seek() {
        const Group& group = a.group;
        const int others = group.num_ranks() - 1;
        next.source = -1;
#pragma unroll 1
        for (int item = claims[index]; item < items; item = claims[++index]) {
            next.chunk = item / others;
            int source = group.rank() + 1 + item - next.chunk * others;
            if (source >= group.num_ranks()) source -= group.num_ranks();
            const int rows = scratch.sources[source].rows, per_chunk = chunk_rows(rows);
            next.row = next.chunk * per_chunk;
            end = min(rows, next.row + per_chunk);
            if (next.row < end) {
                next.source = source;
                return;
            }
            claims.take();
        }
    }
    __device__ __forceinline__ void load_next() {
        if (next.source < 0) return;
        const int last = a.pieces.count - 1;
        if (lane_of() == 0) {
            sent[ring.filling] = next;
            if (next.row + 1 < end || next.piece < last) sent[ring.filling].chunk = -1;
        }
        const int64_t row = a.work.row(scratch.sources[next.source].first + next.row);
        ring.load(a.work.x + row * a.work.stride_bytes +
                      static_cast<int64_t>(next.piece) * a.pieces.bytes,
                  a.pieces.bytes_of(next.piece));
        if (next.piece++ < last) return;
        next.piece = 0;
        if (++next.row < end) return;
        ++index;
        claims.take();
        seek();
    }
    // The next piece to where it belongs. Whole warps.
    __device__ __forceinline__ void store_piece(const Sent& what, const Homeward& home,
                                                uint8_t* inbox, Underway<kLag>& underway) {
        const int64_t row_bytes = 2LL * a.work.hidden;
        if (what.piece == 0) send_weights(a, home, inbox, what.row);
        const uint8_t* stage = ring.await();
        if (lane_of() == 0) {
            ptx::start_store(inbox + (home.to + what.row) * row_bytes +
                                 static_cast<int64_t>(what.piece) * a.pieces.bytes,
                             stage, static_cast<uint32_t>(a.pieces.bytes_of(what.piece)));
            if (what.chunk >= 0) {
                underway.add(a.group.chunk(what.source, a.group.rank(), what.chunk));
            }
        }
        ptx::commit_stores();
    }
    // Returns when all has arrived. False: gave up.
    __device__ __forceinline__ bool send(uint64_t epoch) {
        // Its time begins before that of the reducing warps: those may wait for a rank that waits
        // here itself, and the fault must name the one that is missing.
        Watch watch{a.group.waits, Op::kNormalCombine, Watch::kPollsPerCheck * 3 / 4};
        Inboxes inboxes;
        Underway<kLag> underway;
        Outbox& outbox = scratch.outboxes[warp_of()];
#pragma unroll 1
        while (ring.loads > 0) {
            ptx::await_stores_read<kStages - kAhead - 1>();
            ptx::await_stores<kLag - 1>();
            if (lane_of() == 0) underway.pass_oldest(outbox);
            __syncwarp();
            load_next();
            const Sent what = sent[ring.next_used];
            const Homeward home = scratch.sources[what.source];
            const auto layout = InboxLayout::make(home.in_inbox, a.work.hidden, a.work.topk);
            uint8_t* inbox = inboxes.open(a.group, watch, what.source, layout.bytes, epoch);
            if (inbox == nullptr) break;
            store_piece(what, home, inbox, underway);
        }
        const bool ok = ring.loads == 0;
        ring.drain();
        ptx::await_stores<0>();
        __syncwarp();
        if (lane_of() == 0) {
#pragma unroll
            for (int i = 0; i < kLag; ++i) underway.pass_oldest(outbox);
            ptx::store_release_cta(&outbox.sent, underway.arrived | Outbox::kClosed);
        }
        return ok;
    }
};

// The sending warps. False: gave up.
__device__ __forceinline__ bool send_chunks(const CombineArgs& a, const CombineScratch& scratch,
                                            uint64_t epoch) {
    const int warps = sending_warps(static_cast<int>(gridDim.x));
    if (warp_of() >= warps) return true;
    if (warps == 1) return ChunkSender<1>::start(a, scratch).send(epoch);
    if (warps == 2) return ChunkSender<2>::start(a, scratch).send(epoch);
    return ChunkSender<kSendWarps>::start(a, scratch).send(epoch);
}

}  // namespace ep::normal

// Combine, the sending warps: rows go back to their sources, through the copy engine, packed on
// their way through shared memory where there are SMs for it.
//
// A source's rows are cut into chunks; a warp sends a whole chunk and then tells the source. All
// sources' first chunks go out first, as the sources' reducing warps want them.
#pragma once

#include "cuda/normal_combine_scratch.cuh"
#include "cuda/normal_pack.cuh"

namespace ep::normal {

// The sources' inboxes as a warp has found them so far; source s is on lane s % 32.
struct Inboxes {
    int64_t offset[kRounds] = {};  // in the source's data heap, and 1 more; 0: not known
    int32_t last = -1;  // the source that was asked for last, and its inbox: mostly it is next too
    uint8_t* at = nullptr;

    // Waits for the source's credit, the first time. It cannot be of a later epoch: the source goes
    // on only with all rows, and some of them are this warp's. Whole warps; nullptr: gave up.
    __device__ __forceinline__ uint8_t* open(const Group& group, Watch& watch, int source,
                                             int64_t bytes, uint64_t terms, uint64_t epoch) {
        if (source == last) return at;
        at = find(group, watch, source, bytes, terms, epoch);
        last = source;
        return at;
    }
    __device__ __forceinline__ uint8_t* find(const Group& group, Watch& watch, int source,
                                             int64_t bytes, uint64_t terms, uint64_t epoch) {
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
        if (lane_of() == 0) {
            ok = check_credit(group, Op::kNormalCombine, source, found, bytes, terms);
        }
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

// How combine's warps send.
template <int kWarpsOf, bool kPacksOf, int kAheadOf, int kLagOf>
struct Sending {
    static constexpr int kWarps = kWarpsOf;
    static constexpr bool kPacks = kPacksOf;
    static constexpr int kStages = kCombineStages / kWarps / (kPacks ? 2 : 1);
    static constexpr int kAhead = kAheadOf;  // pieces; more: held when others are done
    static constexpr int kLag = kLagOf;  // pieces on their way
};
using ManyPack = Sending<kSendWarps, true, 1, 1>;
using TwoPack = Sending<2, true, 2, 1>;
using OnePacks = Sending<1, true, 3, 1>;
using ManySend = Sending<kSendWarps, false, 2, 4>;
using TwoSend = Sending<2, false, 3, 3>;
using OneSends = Sending<1, false, 3, 1>;

// The chunks of one of the sending warps. Item by item: chunk by chunk; within a chunk, the other
// ranks from the next one on.
template <class How>
struct ChunkSender {
    static constexpr int kWarps = How::kWarps, kStages = How::kStages, kAhead = How::kAhead;
    static constexpr int kLag = How::kLag;
    using SendRing = Ring<kStages, kAhead, kCombineBytes>;

    const CombineArgs& a;
    const CombineScratch& scratch;
    SendRing ring;
    Sent* sent;  // beside the stages
    Claims claims;
    int32_t items = 0;
    int32_t index = 0;
    Sent next{-1, 0, 0, 0};  // chunk: the one being loaded; source -1: none is left
    int32_t end = 0;  // of its rows
    uint32_t packed = 0;  // pieces of the row being sent,
    bool any_packed = false;  // of the chunk

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
    // Packs the piece in a stage, if it does, and says where it then lies and how large it is. What
    // went out of that place before has been read: it is kStages pieces ago.
    __device__ __forceinline__ const uint8_t* pack(const Sent& what, int slot, const uint8_t* stage,
                                                   int& bytes) {
        if (what.piece == 0) packed = 0;
        uint8_t* to = scratch.slots + (warp_of() * kStages + slot) * kCombineBytes;
        const int parts = bytes / PackedPiece::kRawPart;
        if (!pack_piece(stage, parts, to)) return stage;
        ptx::fence_async_shared();  // the copy engine sees it
        packed |= 1u << what.piece;
        any_packed = true;
        bytes = PackedPiece::bytes(parts);
        __syncwarp();
        return to;
    }
    // The next piece to where it belongs. Whole warps.
    __device__ __forceinline__ void store_piece(const Sent& what, const Homeward& home,
                                                uint8_t* inbox, const InboxLayout& layout,
                                                Underway<kLag>& underway) {
        const int64_t row_bytes = 2LL * a.work.hidden, row = home.to + what.row;
        if (what.piece == 0) send_weights(a, home, inbox, what.row);
        const int slot = ring.next_used;
        const uint8_t* from = ring.await();
        int bytes = a.pieces.bytes_of(what.piece);
        if constexpr (How::kPacks) from = pack(what, slot, from, bytes);
        if (lane_of() == 0) {
            ptx::start_store(
                inbox + row * row_bytes + static_cast<int64_t>(what.piece) * a.pieces.bytes, from,
                static_cast<uint32_t>(bytes));
            if (How::kPacks && what.piece == a.pieces.count - 1) {
                reinterpret_cast<uint32_t*>(inbox + layout.packed)[row] = packed;
            }
            if (what.chunk >= 0) {
                underway.add(a.group.chunk(what.source, a.group.rank(), what.chunk), any_packed);
            }
        }
        if (what.chunk >= 0) any_packed = false;
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
            __syncwarp();  // the other lanes' weights come before the announcement
            if (lane_of() == 0) underway.pass_oldest(outbox);
            __syncwarp();
            load_next();
            const Sent what = sent[ring.next_used];
            const Homeward home = scratch.sources[what.source];
            const auto layout = InboxLayout::make(home.in_inbox, a.work.hidden, a.work.topk);
            uint8_t* inbox =
                inboxes.open(a.group, watch, what.source, layout.bytes, a.work.terms(), epoch);
            if (inbox == nullptr) break;
            store_piece(what, home, inbox, layout, underway);
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

template <class Many, class Two, class One>
__device__ __forceinline__ bool send_as(const CombineArgs& a, const CombineScratch& scratch,
                                        uint64_t epoch) {
    if (warp_of() >= a.senders) return true;
    if (a.senders == One::kWarps) return ChunkSender<One>::start(a, scratch).send(epoch);
    if (a.senders == Two::kWarps) return ChunkSender<Two>::start(a, scratch).send(epoch);
    return ChunkSender<Many>::start(a, scratch).send(epoch);
}

// The sending warps. False: gave up.
__device__ __forceinline__ bool send_chunks(const CombineArgs& a, const CombineScratch& scratch,
                                            uint64_t epoch) {
    return a.packs ? send_as<ManyPack, TwoPack, OnePacks>(a, scratch, epoch)
                   : send_as<ManySend, TwoSend, OneSends>(a, scratch, epoch);
}

}  // namespace ep::normal

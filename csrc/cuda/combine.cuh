// Combine: the expert's rank adds up its rows of each message and sends the sum home; the source
// adds what its ranks sent.
//
// Both halves work on parts of a row: thread v of a part moves vector v of its lines, in registers.
// Sums are FP32 in a fixed order (k, then rank), rounded to BF16 once at the sender and once at
// home.
#pragma once

#include "cuda/kernels.h"
#include "cuda/late_weights.cuh"
#include "cuda/lines.cuh"
#include "ep/fp8.h"

namespace ep {

// Whether a rank's sum for its own tokens goes through its inbox, as those for others do, or is
// worked out by the receive. The inbox lets the caller reuse y between the send and the receive;
// without it there is less to move.
enum class OwnRows { kThroughInbox, kDirect };
// When weights came: with the dispatch, or with this combine (late_weights.cuh).
enum class Weights { kKnown, kLate };

// Eight channels' sums: two granules of four.
struct Sum8 {
    float f[8] = {};

    // acc = w * x + acc, each rounded once: the host backend does the same.
    __device__ __forceinline__ void add(float w, ptx::Vector x) {
        const uint32_t words[4] = {static_cast<uint32_t>(x.lo), static_cast<uint32_t>(x.lo >> 32),
                                   static_cast<uint32_t>(x.hi), static_cast<uint32_t>(x.hi >> 32)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            f[2 * j] = __fmaf_rn(w, bits_to_float(words[j] << 16), f[2 * j]);
            f[2 * j + 1] = __fmaf_rn(w, bits_to_float(words[j] & 0xffff0000u), f[2 * j + 1]);
        }
    }
    __device__ __forceinline__ uint64_t granule(int g) const {
        const uint64_t lo = ptx::pack_bf16x2(f[4 * g], f[4 * g + 1]);
        const uint64_t hi = ptx::pack_bf16x2(f[4 * g + 2], f[4 * g + 3]);
        return lo | (hi << 32);
    }
    __device__ __forceinline__ ptx::Vector vector() const { return {granule(0), granule(1)}; }
};

// This thread's vector of a part of a row.
struct Place {
    int vector;  // -1: none
    int granule;  // its first
    bool has_lo;
    bool has_hi;  // a tag is not a granule

    static __device__ __forceinline__ Place of(const View& view, int part) {
        const int t = static_cast<int>(threadIdx.x);
        const int v = part * view.part_vectors + t;
        const bool mine = t < view.part_vectors && v < view.combine_vectors;
        const int g = first_granule(v);
        return {mine ? v : -1, g, mine && g < view.num_granules,
                mine && !holds_tag(v) && g + 1 < view.num_granules};
    }
};

// Some entries of a message's list of rows; those behind its end have no row.
struct RefBatch {
    static constexpr int kSize = 4;
    RowRef ref[kSize];

    __device__ __forceinline__ void load(const View& view, const RowRef* refs, int k) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
            ref[j] = k + j < view.topk ? refs[k + j] : RowRef{-1, 0.0f};
        }
    }
};

// Adds the rows of a batch. False: the list ended in it.
template <class Weight>
__device__ __forceinline__ bool add_rows(const CombineInput& in, RefBatch batch, const Place& place,
                                         Weight weight, Sum8& sum) {
    ptx::Vector x[RefBatch::kSize] = {};
    bool more = true;
#pragma unroll
    for (int j = 0; j < RefBatch::kSize; ++j) {
        more = more && batch.ref[j].row >= 0;
        if (!more) batch.ref[j].row = -1;
        const auto* row =
            reinterpret_cast<const uint64_t*>(in.y + batch.ref[j].row * in.row_stride) +
            place.granule;
        if (more && place.has_lo) x[j].lo = row[0];
        if (more && place.has_hi) x[j].hi = row[1];
    }
#pragma unroll
    for (int j = 0; j < RefBatch::kSize; ++j) {
        if (batch.ref[j].row >= 0) sum.add(weight(batch.ref[j]), x[j]);
    }
    return more;
}

// The weighted sum of a message's rows. `batch`: the first of the list, already loaded.
template <class Weight>
__device__ __forceinline__ Sum8 reduce_rows(const View& view, const CombineInput& in,
                                            const RowRef* refs, RefBatch batch, const Place& place,
                                            Weight weight) {
    Sum8 sum;
#pragma unroll 1
    for (int k = RefBatch::kSize;; k += RefBatch::kSize) {
        if (!add_rows(in, batch, place, weight, sum) || k >= view.topk) return sum;
        batch.load(view, refs, k);
    }
}

__device__ __forceinline__ const RowRef* refs_of(const View& view, const CombineInput& in,
                                                 int source, int slot) {
    return in.routing.refs + static_cast<int64_t>(source * view.max_tokens + slot) * view.topk;
}

struct KnownWeight {
    __device__ __forceinline__ float operator()(const RowRef& ref) const { return ref.weight; }
};

// Most messages of one source in the handle's dispatch. Whole warps.
__device__ __forceinline__ int most_received(const View& view, const Routing& routing) {
    int most = 0;
#pragma unroll 1
    for (int s = threadIdx.x & 31; s < view.num_ranks; s += 32) {
        most = max(most, routing.received[s]);
    }
    return __reduce_max_sync(kFullWarp, most);
}

// The parts of all messages, slot by slot; within a slot, the sources in turn.
struct SendItem {
    int slot;
    int source;
    int part;

    template <OwnRows kOwn>
    static __device__ __forceinline__ SendItem of(const View& view, int item) {
        constexpr bool kDirect = kOwn == OwnRows::kDirect;
        const int slot = kDirect ? view.by_remote_items(item) : view.by_slot_items(item);
        const int sources = kDirect ? view.num_ranks - 1 : view.num_ranks;
        const int within = item - slot * sources * view.parts;
        const int source = view.by_parts(within);
        const bool past_us = kDirect && source >= view.rank;
        return {slot, past_us ? source + 1 : source, within - source * view.parts};
    }
};

// This thread's vector of a message's sum. Whole warps; false: gave up.
template <Weights kWeights>
__device__ __forceinline__ bool sum_message(const View& view, const CombineInput& in, Watch& watch,
                                            int source, int slot, const RefBatch& batch,
                                            const Place& place, uint64_t epoch, ptx::Vector& sum) {
    const RowRef* refs = refs_of(view, in, source, slot);
    if constexpr (kWeights == Weights::kKnown) {
        sum = reduce_rows(view, in, refs, batch, place, KnownWeight{}).vector();
    } else {
        LateWeights late{};
        if (!late.load(view, in, watch, source, slot, epoch)) return false;
        sum = reduce_rows(view, in, refs, batch, place, late).vector();
    }
    return true;
}

// Adds up one part of one message and sends it. Pairs with gather_vector at the message's source.
// Whole warps; false: gave up.
template <Weights kWeights>
__device__ __forceinline__ bool send_item(const View& view, const CombineInput& in, Watch& watch,
                                          const SendItem& item, uint64_t epoch) {
    // Asked for together; whether the message exists is known when both are here.
    RefBatch batch;
    batch.load(view, refs_of(view, in, item.source, item.slot), 0);
    if (item.slot >= in.routing.received[item.source]) return true;
    const Place place = Place::of(view, item.part);
    ptx::Vector out{};
    if (!sum_message<kWeights>(view, in, watch, item.source, item.slot, batch, place, epoch, out)) {
        return false;
    }
    if (holds_tag(place.vector)) out.hi = epoch;
    uint8_t* to = view.peer[item.source] + view.combine_out + view.combine_at(epoch) +
                  static_cast<int64_t>(item.slot) * view.combine_stride + 16 * place.vector;
    if (place.vector >= 0) ptx::store_line_vector(to, out);
    return true;
}

// One vector of the token's row: waits for it from every rank the token went to, and adds in rank
// order. Whole warps; false: gave up.
template <int kInFlight, OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ bool gather_vector(const View& view, const CombineInput& in,
                                              Watch& watch, const int32_t* sent_to, int token,
                                              const Place& place, uint64_t epoch, Sum8& sum) {
    const int32_t* sent = sent_to + token * view.num_ranks;
    const uint8_t* inbox = view.combine_in + view.combine_at(epoch);
    const bool wanted = place.vector >= 0;
    ptx::Vector mine{};
    bool has_own = false;
    if (kOwn == OwnRows::kDirect) {
        const int slot = sent[view.rank];
        has_own = slot >= 0 && wanted;
        if (slot >= 0) {
            RefBatch batch;
            batch.load(view, refs_of(view, in, view.rank, slot), 0);
            // Rounded as if it had travelled.
            if (!sum_message<kWeights>(view, in, watch, view.rank, slot, batch, place, epoch,
                                       mine)) {
                return false;
            }
        }
    }
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += kInFlight) {
        const uint8_t* from[kInFlight];
        int peers[kInFlight];
        ptx::Vector row[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int r = base + j;
            const bool direct = kOwn == OwnRows::kDirect && r == view.rank;
            const int slot = r < view.num_ranks && !direct ? sent[r] : -1;
            const int64_t at =
                static_cast<int64_t>(r * view.max_tokens + slot) * view.combine_stride;
            from[j] = slot >= 0 && wanted ? inbox + at + 16 * place.vector : nullptr;
            peers[j] = r;
        }
        const bool tag_lane = holds_tag(place.vector);
        if (!await_vectors<kInFlight>(watch, from, peers, tag_lane, epoch, row)) return false;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            if (from[j] != nullptr) sum.add(1.0f, row[j]);
            if (has_own && base + j == view.rank) sum.add(1.0f, mine);
        }
    }
    return true;
}

// Adds up one part of one token. Padding rows and tokens without experts become zeros.
template <int kInFlight, OwnRows kOwn, Weights kWeights>
__device__ __forceinline__ bool recv_item(const View& view, const CombineInput& in,
                                          const CombineOutput& out, Watch& watch, int part,
                                          int token, int valid, uint64_t epoch) {
    const Place place = Place::of(view, part);
    Sum8 sum;
    if (token < valid && !gather_vector<kInFlight, kOwn, kWeights>(
                             view, in, watch, out.routing.sent, token, place, epoch, sum)) {
        return false;
    }
    auto* row = reinterpret_cast<uint64_t*>(out.out + static_cast<int64_t>(token) * view.hidden) +
                place.granule;
    if (place.has_lo) row[0] = sum.granule(0);
    if (place.has_hi) row[1] = sum.granule(1);
    return true;
}

}  // namespace ep

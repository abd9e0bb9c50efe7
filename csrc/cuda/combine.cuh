// Combine: the expert's rank adds up its rows of each message and sends the sum home; the source
// adds what its ranks sent.
//
// Both halves work on parts of a row: thread v of a part moves vector v of its lines, in registers.
// Sums are FP32 in a fixed order (k, then rank), rounded to BF16 once at the sender and once at
// home.
#pragma once

#include "cuda/kernels.h"
#include "cuda/lines.cuh"
#include "ep/fp8.h"

namespace ep {

// Whether a rank's sum for its own tokens goes through its inbox, as those for others do, or is
// worked out by the receive. The inbox lets the caller reuse y between the send and the receive;
// without it there is less to move.
enum class OwnRows { kThroughInbox, kDirect };

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

__device__ __noinline__ inline void check_combine_order(const View& view) {
    const ChainState& state = *view.state;
    if (state.dispatched == state.combined + 1) return;
    fail(view, FaultCode::kSequence, Op::kCombine, -1, state.combined + 1, state.dispatched);
}

// The weighted sum of a message's rows, four rows in flight.
__device__ __forceinline__ Sum8 reduce_rows(const View& view, const CombineInput& in,
                                            const RowRef* refs, const Place& place) {
    constexpr int kInFlight = 4;
    Sum8 sum;
    bool more = true;
#pragma unroll 1
    for (int k = 0; k < view.topk && more; k += kInFlight) {
        RowRef ref[kInFlight];
        ptx::Vector x[kInFlight] = {};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            ref[j] = k + j < view.topk ? refs[k + j] : RowRef{-1, 0.0f};
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            more = more && ref[j].row >= 0;
            if (!more) ref[j].row = -1;
            const auto* row = reinterpret_cast<const uint64_t*>(in.y + ref[j].row * in.row_stride) +
                              place.granule;
            if (more && place.has_lo) x[j].lo = row[0];
            if (more && place.has_hi) x[j].hi = row[1];
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            if (ref[j].row >= 0) sum.add(ref[j].weight, x[j]);
        }
    }
    return sum;
}

__device__ __forceinline__ const RowRef* refs_of(const View& view, int source, int slot) {
    return view.refs + static_cast<int64_t>(source * view.max_tokens + slot) * view.topk;
}

// Most messages of one source in the last dispatch. Whole warps.
__device__ __forceinline__ int most_received(const View& view) {
    int most = 0;
#pragma unroll 1
    for (int s = threadIdx.x & 31; s < view.num_ranks; s += 32) most = max(most, view.received[s]);
    return __reduce_max_sync(kFullWarp, most);
}

// The parts of all messages, slot by slot; within a slot, the sources in turn.
template <OwnRows kOwn>
struct SendItems {
    static __device__ __forceinline__ int slot_of(const View& view, int item) {
        return kOwn == OwnRows::kDirect ? view.by_remote_items(item) : view.by_slot_items(item);
    }
    static __device__ __forceinline__ int sources(const View& view) {
        return kOwn == OwnRows::kDirect ? view.num_ranks - 1 : view.num_ranks;
    }
};

// Adds up one part of one message and sends it. Pairs with gather_vector at the message's source.
template <OwnRows kOwn>
__device__ __forceinline__ void send_item(const View& view, const CombineInput& in, int item,
                                          int slot, uint64_t epoch) {
    const int within = item - slot * SendItems<kOwn>::sources(view) * view.parts;
    int source = view.by_parts(within);
    const Place place = Place::of(view, within - source * view.parts);
    if (kOwn == OwnRows::kDirect && source >= view.rank) ++source;
    if (slot >= view.received[source] || place.vector < 0) return;
    ptx::Vector out = reduce_rows(view, in, refs_of(view, source, slot), place).vector();
    if (holds_tag(place.vector)) out.hi = epoch;
    uint8_t* to = view.peer[source] + view.combine_out +
                  static_cast<int64_t>(slot) * view.combine_stride + 16 * place.vector;
    ptx::store_line_vector(to, out);
}

// One vector of the token's row: waits for it from every rank the token went to, and adds in rank
// order. Whole warps; false: gave up.
template <int kInFlight, OwnRows kOwn>
__device__ __forceinline__ bool gather_vector(const View& view, const CombineInput& in,
                                              Watch& watch, int token, const Place& place,
                                              uint64_t epoch, Sum8& sum) {
    const int32_t* sent = view.sent + token * view.num_ranks;
    const bool wanted = place.vector >= 0;
    ptx::Vector mine{};
    bool has_own = false;
    if (kOwn == OwnRows::kDirect) {
        const int slot = sent[view.rank];
        has_own = slot >= 0 && wanted;
        // Rounded as if it had travelled.
        if (has_own) mine = reduce_rows(view, in, refs_of(view, view.rank, slot), place).vector();
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
            from[j] = slot >= 0 && wanted ? view.combine_in + at + 16 * place.vector : nullptr;
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
template <int kInFlight, OwnRows kOwn>
__device__ __forceinline__ bool recv_item(const View& view, const CombineInput& in,
                                          const CombineOutput& out, Watch& watch, int item,
                                          int token, int valid, uint64_t epoch) {
    const Place place = Place::of(view, item - token * view.parts);
    Sum8 sum;
    if (token < valid &&
        !gather_vector<kInFlight, kOwn>(view, in, watch, token, place, epoch, sum)) {
        return false;
    }
    auto* row = reinterpret_cast<uint64_t*>(out.out + static_cast<int64_t>(token) * view.hidden) +
                place.granule;
    if (place.has_lo) row[0] = sum.granule(0);
    if (place.has_hi) row[1] = sum.granule(1);
    return true;
}

struct CombineTokens {
    int rows;  // of the output
    int valid;  // that were dispatched
};

__device__ __forceinline__ CombineTokens combine_tokens(const View& view,
                                                        const CombineOutput& out) {
    const int rows = min(out.num_tokens, view.max_tokens);
    return {rows, out.num_valid == nullptr ? rows : min(rows, *out.num_valid)};
}

__device__ __forceinline__ void note_combined(const View& view) {
    uint64_t messages = 0;
#pragma unroll 1
    for (int s = 0; s < view.num_ranks; ++s) messages += view.received[s];
    view.stats->bytes_combined += 2ULL * view.hidden * messages;
}

// The halves apart, each by the whole grid. Warps of a receive that gave up leave one by one: no
// barrier follows. The epoch still advances, and the abort word stops whatever comes next.
__device__ __forceinline__ void combine_send(const View& view, const CombineInput& in,
                                             uint64_t epoch) {
    constexpr OwnRows kOwn = OwnRows::kThroughInbox;
    const int most = most_received(view);
#pragma unroll 1
    for (int item = blockIdx.x;; item += gridDim.x) {
        const int slot = SendItems<kOwn>::slot_of(view, item);
        if (slot >= most) break;
        send_item<kOwn>(view, in, item, slot, epoch);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) note_combined(view);
}

template <int kInFlight>
__device__ __forceinline__ void combine_recv(const View& view, const CombineOutput& out,
                                             uint64_t epoch) {
    const CombineTokens tokens = combine_tokens(view, out);
    Watch watch{view, Op::kCombine};
#pragma unroll 1
    for (int item = blockIdx.x;; item += gridDim.x) {
        const int token = view.by_parts(item);
        if (token >= tokens.rows) break;
        if (!recv_item<kInFlight, OwnRows::kThroughInbox>(view, {}, out, watch, item, token,
                                                          tokens.valid, epoch)) {
            break;
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) view.state->combined = epoch;
}

// Both halves at once. A CTA takes up token t only when its own sends for slots up to t are done,
// so by induction over slot numbers every send is reached; `lag` leaves the rows time to arrive.
template <int kInFlight>
__device__ __forceinline__ void combine_both(const View& view, const CombineInput& in,
                                             const CombineOutput& out, uint64_t epoch) {
    constexpr OwnRows kOwn = OwnRows::kDirect;
    const int most = view.num_ranks > 1 ? most_received(view) : 0;
    const CombineTokens tokens = combine_tokens(view, out);
    const int lag = view.by_parts(gridDim.x);
    Watch watch{view, Op::kCombine};
    int to_send = blockIdx.x;
    int to_recv = blockIdx.x;
#pragma unroll 1
    while (true) {
        const int slot = SendItems<kOwn>::slot_of(view, to_send);
        const int token = view.by_parts(to_recv);
        const bool sends = slot < most;
        const bool receives = token < tokens.rows;
        if (sends && (!receives || slot <= token + lag)) {
            send_item<kOwn>(view, in, to_send, slot, epoch);
            to_send += gridDim.x;
        } else if (receives) {
            if (!recv_item<kInFlight, kOwn>(view, in, out, watch, to_recv, token, tokens.valid,
                                            epoch)) {
                break;
            }
            to_recv += gridDim.x;
        } else {
            break;
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        note_combined(view);
        view.state->combined = epoch;  // the next dispatch reads it, a kernel boundary later
    }
}

}  // namespace ep

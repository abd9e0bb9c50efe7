// Combine: the sending warps (normal_combine_send.cuh), and the reducing warps, which add up each
// token's rows as their chunks arrive. FP32, ranks in order, rounded to BF16 once.
#pragma once

#include "cuda/normal_arrivals.cuh"
#include "cuda/sums.cuh"

namespace ep::normal {

// One part of a token's sum, lane by lane a vector of every 32.
struct PartSum {
    static constexpr int kVectors = kReduceBytes / ReduceRing::kStep;
    Sum8 sum[kVectors];

    // Sums of what was not loaded are of whatever lies there; nobody stores them.
    __device__ __forceinline__ void add(const LanePart& part) {
#pragma unroll
        for (int u = 0; u < kVectors; ++u) sum[u].add(1.0f, part.v[u]);
    }
    template <bool kWhole>
    __device__ __forceinline__ void store(uint8_t* to, int num_vectors) const {
        to += 16 * lane_of();
        num_vectors -= lane_of();
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            if (!kWhole && 32 * u >= num_vectors) continue;
            *reinterpret_cast<ptx::Vector*>(to + u * ReduceRing::kStep) = sum[u].vector();
        }
    }
};

// A reducing warp's tokens, in the order in which their rows are sent. The copy engine fetches the
// terms of the sums (biases, then rows in rank order) part by part, as far ahead as there are
// stages, each token's when all its rows have come.
//
// kWhole: all parts fill a stage, which spares a step a seventh of its instructions. kUnpacks:
// packed pieces are unpacked on the way from a stage to the sum; else, where only some other rank
// packs, in the inbox, so that steps with few SMs have no instruction for it.
template <bool kWhole, bool kUnpacks>
struct Reducer {
    const CombineArgs& a;
    ReduceRing ring;
    const CombineScratch& scratch;
    uintptr_t* terms;  // of the token being fetched: where, and in the low bits Places::packed
    Claims claims;
    Watch watch;
    uint64_t epoch;
    uint8_t* inbox;
    InboxLayout at;  // in it
    Positions positions{};  // of the token to fetch next
    bool ok = true;
    int32_t listed = 0;  // tokens with terms; what must be known of the i-th is on lane i % 32
    int32_t listed_token = 0;
    int32_t listed_terms = 0;
    int32_t index = -1;  // of the claim that is being fetched
    int32_t token = 0;
    int32_t wanted = 0;  // its terms
    int32_t part = 0;
    int32_t term = 0;

    static __device__ __forceinline__ Reducer start(const CombineArgs& a,
                                                    const CombineScratch& scratch, uint64_t epoch) {
        const int warp = warp_of() - kFirstReducer;
        Reducer r{a,
                  ReduceRing::carve(scratch.reduce_stages, warp),
                  scratch,
                  scratch.terms + warp * kMostTerms,
                  Claims::start(a.group, kCombineTokens, warp, kReduceWarps),
                  Watch{a.group.waits, Op::kNormalCombine},
                  epoch,
                  a.group.data[a.group.rank()] + a.work.inbox_offset,
                  InboxLayout::make(scratch.sources[a.group.rank()].in_inbox, a.work.hidden,
                                    a.work.topk)};
        r.look_up(r.claims[0]);
        r.claims.take();
        r.next_token();
        return r;
    }
    __device__ __forceinline__ void look_up(int of) {
        positions.load(a.tables.send_position, a.group.num_ranks(), of, a.work.num_tokens);
    }
    __device__ __forceinline__ const uint8_t* row_at(int rank, int64_t row) const {
        return rank == a.group.rank() ? a.work.x + row * a.work.stride_bytes
                                      : inbox + row * 2 * a.work.hidden;
    }
    __device__ __forceinline__ void unpack_rows(Places& places) const {
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            unsigned left = __ballot_sync(kFullWarp, places.packed[j] != 0);
#pragma unroll 1
            while (left != 0) {
                int from = 0;
                const int64_t row = next_row(left, places.row[j], from);
                const uint32_t packed = __shfl_sync(kFullWarp, places.packed[j], from);
                unpack_row(inbox + row * 2 * a.work.hidden, packed, 2 * a.work.hidden);
            }
            places.packed[j] = 0;
        }
    }
    // Lists the terms of `token`.
    __device__ __forceinline__ void list_terms(const Places& places) {
        __syncwarp();  // the list before is used up
        wanted = 0;
#pragma unroll
        for (const uint16_t* bias : a.work.bias) {
            if (bias == nullptr) continue;
            const auto* row = bias + static_cast<int64_t>(token) * a.work.hidden;
            if (lane_of() == 0) terms[wanted] = reinterpret_cast<uintptr_t>(row);
            ++wanted;
        }
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const unsigned who = __ballot_sync(kFullWarp, places.row[j] >= 0);
            if (places.row[j] >= 0) {
                terms[wanted + __popc(who & ((1u << lane_of()) - 1))] =
                    reinterpret_cast<uintptr_t>(row_at(lane_of() + 32 * j, places.row[j])) +
                    places.packed[j];
            }
            wanted += __popc(who);
        }
        __syncwarp();
        if (wanted == 0) return store_zeros();
        if (lane_of() == (listed & 31)) {
            listed_token = token;
            listed_terms = wanted;
        }
        ++listed;
    }
    __device__ __forceinline__ void store_zeros() const {
        auto* out = reinterpret_cast<ptx::Vector*>(out_of(token));
        for (int i = lane_of(); i < a.work.hidden / 8; i += 32) out[i] = {0, 0};
    }
    __device__ __forceinline__ uint8_t* out_of(int64_t of) const {
        return reinterpret_cast<uint8_t*>(a.work.out + of * a.work.hidden);
    }
    // To the next token with terms, or behind the last.
    __device__ __forceinline__ void next_token() {
        part = term = wanted = 0;
#pragma unroll 1
        while (wanted == 0) {
            token = claims[++index];
            if (token >= a.work.num_tokens) return;
            Places places;
            ok = places.find(a, scratch.arrivals,
                             reinterpret_cast<const uint32_t*>(inbox + at.packed), watch, positions,
                             epoch);
            if (!ok) {
                token = a.work.num_tokens;
                return;
            }
            claims.take();
            look_up(claims[index + 1]);
            if (kWhole && !kUnpacks) unpack_rows(places);
            list_terms(places);
            if (a.work.out_weights == nullptr) continue;
            reduce_weights(a, reinterpret_cast<const float*>(inbox + at.topk_weights), places,
                           token);
        }
    }
    __device__ __forceinline__ int offset_of(int p) const {
        return p * (kWhole ? kReduceBytes : a.parts.bytes);
    }
    __device__ __forceinline__ int bytes_of(int p) const {
        return kWhole ? kReduceBytes : a.parts.bytes_of(p);
    }
    // Of the row at this term.
    __device__ __forceinline__ void load_part(uintptr_t what) {
        const auto* row = reinterpret_cast<const uint8_t*>(what & ~uintptr_t{kRowMultiple - 1});
        const int piece = part / PackedPiece::kParts, p = part % PackedPiece::kParts;
        if (!kUnpacks || (what >> piece & 1) == 0) {
            return ring.template load<kWhole>(row + offset_of(part), bytes_of(part) / 16);
        }
        row += static_cast<int64_t>(piece) * PackedPiece::kRawBytes;
        ring.load_packed(row + PackedPiece::body(p), row + PackedPiece::header(p));
    }
    __device__ __forceinline__ void load_next() {
        if (token >= a.work.num_tokens) return ring.template load<kWhole>(nullptr, 0);
        load_part(terms[term]);
        if (++term < wanted) return;
        term = 0;
        if (++part < a.parts.count) return;
        next_token();
    }
    // The sum of the i-th token that was listed.
    __device__ __forceinline__ void reduce(int i) {
        const int count = __shfl_sync(kFullWarp, listed_terms, i & 31);
        uint8_t* out = out_of(__shfl_sync(kFullWarp, listed_token, i & 31));
#pragma unroll 1
        for (int p = 0; p < a.parts.count; ++p) {
            PartSum sum;
#pragma unroll 1
            for (int t = 0; t < count; ++t) {
                load_next();
                const bool packed = kUnpacks && ring.next_is_packed();
                const uint8_t* stage = ring.await();
                sum.add(packed ? unpack_part(stage, stage + 3 * ReduceRing::kStep)
                               : LanePart::load(stage));
            }
            sum.template store<kWhole>(out + offset_of(p), bytes_of(p) / 16);
        }
    }
    // False: gave up, with the sums of what had come.
    __device__ __forceinline__ bool run() {
#pragma unroll 1
        for (int i = 0; i < ReduceRing::kAhead; ++i) load_next();
#pragma unroll 1
        for (int i = 0; i < listed; ++i) reduce(i);
        return ok;
    }
};

// The whole grid.
__device__ __forceinline__ void combine(const CombineArgs& a, uint8_t* smem) {
    ptx::await_previous_kernel();
    const Group& group = a.group;
    const CombineScratch scratch = CombineScratch::carve(smem, group.num_ranks());
    const uint64_t epoch = group.state->combined + 1;  // the last CTA moves it on
    if (blockIdx.x == 0 && warp_of() == 0) {
        publish_credit(group, group.control.combine_credit_offset,
                       {a.work.inbox_offset, 0, epoch, a.work.terms()});
    }
    find_sources(a, scratch.sources);
    if (threadIdx.x < kSendWarps) {
        Outbox& outbox = scratch.outboxes[threadIdx.x];
        outbox.sent = outbox.told = 0;
    }
    bool ok = may_run(group, Op::kNormalCombine);  // its barrier is that of the scratch too
    if (ok) {
        if (warp_of() < kSendWarps) {
            ok = send_chunks(a, scratch, epoch);
        } else if (warp_of() == kAnnouncer) {
            announce(scratch.outboxes, a.senders, epoch);
        } else {
            if (warp_of() == kFirstReducer) find_arrivals(a, scratch.arrivals);
            ptx::sync_some<2, 32 * kReduceWarps>();  // not the sending warps, which begin before
            const bool whole = a.parts.bytes == kReduceBytes && a.parts.last == kReduceBytes;
            ok = !whole    ? Reducer<false, false>::start(a, scratch, epoch).run()
                 : a.packs ? Reducer<true, true>::start(a, scratch, epoch).run()
                           : Reducer<true, false>::start(a, scratch, epoch).run();
        }
    }
    ok = __syncthreads_or(!ok) == 0;  // the first warp that allows it does so for the CTA
    ptx::allow_next_kernel();  // not before: until then it would hold SMs that are not ours
    if (finish(group, kCombineTicket, {kCombineChunks, kCombineTokens}, !ok) && threadIdx.x == 0) {
        group.state->combined = epoch;
    }
}

}  // namespace ep::normal

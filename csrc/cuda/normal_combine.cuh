// Combine: the sending warps (normal_combine_send.cuh), and the reducing warps, which add up each
// token's rows as their chunks arrive. FP32, ranks in order, rounded to BF16 once.
#pragma once

#include "cuda/normal_combine_send.cuh"
#include "cuda/sums.cuh"

namespace ep::normal {

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
                                         Watch& watch, const Positions& positions, uint64_t epoch) {
        const Group& group = a.group;
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const int d = lane_of() + 32 * j, position = positions.at[j];
            row[j] = -1;
            if (32 * j >= group.num_ranks()) continue;
            const uint64_t* word = nullptr;
            if (position >= 0) {
                row[j] = static_cast<int64_t>(arrivals.first[j]) + position;
                if (d == group.rank()) {
                    row[j] = a.work.row(row[j]);
                } else {
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

// One part of a token's sum, lane by lane a vector of every 32.
struct PartSum {
    static constexpr int kVectors = static_cast<int>(ceil_div(kReduceBytes, 32 * 16));
    Sum8 sum[kVectors];

    __device__ __forceinline__ void add(const uint8_t* part, int num_vectors) {
        ptx::Vector v[kVectors] = {};
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            const int i = lane_of() + 32 * u;
            if (i < num_vectors) v[u] = reinterpret_cast<const ptx::Vector*>(part)[i];
        }
        // What was not loaded adds +0, which changes nothing: a sum begins as +0.
#pragma unroll
        for (int u = 0; u < kVectors; ++u) sum[u].add(1.0f, v[u]);
    }
    __device__ __forceinline__ void store(uint8_t* to, int num_vectors) const {
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            const int i = lane_of() + 32 * u;
            if (i < num_vectors) reinterpret_cast<ptx::Vector*>(to)[i] = sum[u].vector();
        }
    }
};

// A reducing warp's tokens, in the order in which their rows are sent. The copy engine fetches the
// terms of the sums (biases, then rows in rank order) part by part, as far ahead as there are
// stages, each token's when all its rows have come.
struct Reducer {
    const CombineArgs& a;
    ReduceRing ring;
    const uint8_t** terms;  // of the token being fetched
    Claims claims;
    Watch watch;
    uint64_t epoch;
    const uint8_t* inbox;
    const float* inbox_weights = nullptr;
    Arrivals arrivals{};
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
                  scratch.terms + warp * kMostTerms,
                  Claims::start(a.group, kCombineTokens, warp, kReduceWarps),
                  Watch{a.group.waits, Op::kNormalCombine},
                  epoch,
                  a.group.data[a.group.rank()] + a.work.inbox_offset};
        r.arrivals.find(a);
        const auto layout = InboxLayout::make(r.arrivals.in_inbox, a.work.hidden, a.work.topk);
        r.inbox_weights = reinterpret_cast<const float*>(r.inbox + layout.topk_weights);
        r.look_up(r.claims[0]);
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
    // Lists the terms of `token`.
    __device__ __forceinline__ void list_terms(const Places& places) {
        __syncwarp();  // the list before is used up
        wanted = 0;
#pragma unroll
        for (const uint16_t* bias : a.work.bias) {
            if (bias == nullptr) continue;
            const auto* row = bias + static_cast<int64_t>(token) * a.work.hidden;
            if (lane_of() == 0) terms[wanted] = reinterpret_cast<const uint8_t*>(row);
            ++wanted;
        }
#pragma unroll
        for (int j = 0; j < kRounds; ++j) {
            const unsigned who = __ballot_sync(kFullWarp, places.row[j] >= 0);
            if (places.row[j] >= 0) {
                terms[wanted + __popc(who & ((1u << lane_of()) - 1))] =
                    row_at(lane_of() + 32 * j, places.row[j]);
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
            ok = places.find(a, arrivals, watch, positions, epoch);
            if (!ok) {
                token = a.work.num_tokens;
                return;
            }
            claims.take();
            look_up(claims[index + 1]);
            list_terms(places);
            if (a.work.out_weights != nullptr) reduce_weights(a, inbox_weights, places, token);
        }
    }
    __device__ __forceinline__ void load_next() {
        if (token >= a.work.num_tokens) return ring.load(nullptr, 0);
        ring.load(terms[term] + static_cast<int64_t>(part) * a.parts.bytes,
                  a.parts.bytes_of(part, 2LL * a.work.hidden) / 16);
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
            const int num_vectors = a.parts.bytes_of(p, 2LL * a.work.hidden) / 16;
            PartSum sum;
#pragma unroll 1
            for (int t = 0; t < count; ++t) {
                load_next();
                sum.add(ring.await(), num_vectors);
            }
            sum.store(out + static_cast<int64_t>(p) * a.parts.bytes, num_vectors);
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
    const CombineScratch scratch = CombineScratch::carve(smem);
    const uint64_t epoch = group.state->combined + 1;  // the last CTA moves it on
    if (blockIdx.x == 0 && warp_of() == 0) {
        publish_credit(group, group.control.combine_credit_offset, {a.work.inbox_offset, 0, epoch});
    }
    bool ok = may_run(group, Op::kNormalCombine);
    if (ok) {
        find_sources(a, scratch.sources);
        if (threadIdx.x < kSendWarps) {
            Outbox& outbox = scratch.outboxes[threadIdx.x];
            outbox.sent = outbox.told = 0;
        }
        __syncthreads();
        if (warp_of() < kSendWarps) {
            ok = send_chunks(a, scratch, epoch);
        } else if (warp_of() == kAnnouncer) {
            announce(scratch.outboxes, sending_warps(static_cast<int>(gridDim.x)), epoch);
        } else {
            ok = Reducer::start(a, scratch, epoch).run();
        }
    }
    ptx::allow_next_kernel();  // not before: until then it would hold SMs that are not ours
    if (finish(group, kCombineTicket, {kCombineChunks, kCombineTokens}, !ok) && threadIdx.x == 0) {
        group.state->combined = epoch;
    }
}

}  // namespace ep::normal

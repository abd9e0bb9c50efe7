// Combine: the expert's rank adds up its rows of each message and sends the sum home; the source
// adds what its ranks sent.
//
// Both halves work on parts of a row: thread v of a part moves vector v of its lines, in registers.
// Sums are FP32 in a fixed order (k, then rank), rounded to BF16 once at the sender and once at
// home.
#pragma once

#include "cuda/lines.cuh"
#include "ep/fp8.h"

namespace ep {

// A row of the combine inbox, cut so that one pass of the CTA covers a part. Made on the host.
struct RowParts {
    int32_t parts;
    int32_t lines_per_part;
    FastDiv by_parts;
    FastDiv by_slot_items;  // parts of one slot of every source

    static RowParts make(const Context& ctx, int threads) {
        const int fit = threads / kVectorsPerLine;
        const auto parts = static_cast<int32_t>(ceil_div(ctx.layout.combine_lines, fit));
        return {parts, static_cast<int32_t>(ceil_div(ctx.layout.combine_lines, parts)),
                FastDiv::by(static_cast<uint32_t>(parts)),
                FastDiv::by(static_cast<uint32_t>(parts * ctx.shape.num_ranks))};
    }
    // This thread's vector of the part, or -1.
    __device__ __forceinline__ int vector(int part, int combine_lines) const {
        const int line = part * lines_per_part + static_cast<int>(threadIdx.x) / kVectorsPerLine;
        const bool mine = static_cast<int>(threadIdx.x) < lines_per_part * kVectorsPerLine;
        return mine && line < combine_lines
                   ? line * kVectorsPerLine + static_cast<int>(threadIdx.x & 7)
                   : -1;
    }
};

// Seven or eight channels' sums: two granules of four.
struct Sum8 {
    float f[8] = {};

    // acc = w * x + acc, each rounded once: the host backend does the same.
    __device__ __forceinline__ void add(float w, uint64_t lo, uint64_t hi) {
        const uint64_t granules[2] = {lo, hi};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const uint32_t word = static_cast<uint32_t>(granules[j / 4] >> (32 * ((j / 2) & 1)));
            const float x = bits_to_float((j & 1) ? (word & 0xffff0000u) : (word << 16));
            f[j] = __fmaf_rn(w, x, f[j]);
        }
    }
    __device__ __forceinline__ uint64_t granule(int g) const {
        const uint64_t lo = ptx::pack_bf16x2(f[4 * g], f[4 * g + 1]);
        const uint64_t hi = ptx::pack_bf16x2(f[4 * g + 2], f[4 * g + 3]);
        return lo | (hi << 32);
    }
};

__device__ inline void check_combine_order(const Context& ctx, int chain) {
    const ChainState* state = ctx.state(chain);
    if (state->dispatched == state->combined + 1) return;
    fail(ctx, FaultCode::kSequence, Op::kCombine, chain, -1, state->combined + 1,
         state->dispatched);
}

struct CombineInput {
    const uint16_t* y;  // rows as the receive laid them out, BF16
    int64_t row_stride;  // elements
};

struct CombineOutput {
    uint16_t* out;  // [T, H]
    int32_t num_tokens;
    const int32_t* num_valid;  // device scalar; nullptr: all rows are real
};

// The weighted sum of a message's rows, four rows in flight.
__device__ __forceinline__ Sum8 reduce_rows(const CombineInput& in, const RowRef* refs, int topk,
                                            int64_t granule, bool has_hi, bool has_lo) {
    constexpr int kInFlight = 4;
    Sum8 sum;
    bool more = true;
#pragma unroll 1
    for (int k = 0; k < topk && more; k += kInFlight) {
        RowRef ref[kInFlight];
        uint64_t lo[kInFlight] = {}, hi[kInFlight] = {};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) ref[j] = k + j < topk ? refs[k + j] : RowRef{-1, 0.0f};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            more = more && ref[j].row >= 0;
            if (!more) ref[j].row = -1;
            if (!more) continue;
            const auto* row = reinterpret_cast<const uint64_t*>(in.y + ref[j].row * in.row_stride);
            if (has_lo) lo[j] = row[granule];
            if (has_hi) hi[j] = row[granule + 1];
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            if (ref[j].row >= 0) sum.add(ref[j].weight, lo[j], hi[j]);
        }
    }
    return sum;
}

// Whether a rank's sum for its own tokens goes through its inbox, as those for others do, or is
// worked out by the receive. The inbox lets the caller reuse y between the send and the receive;
// without it there is less to move.
enum class OwnRows { kThroughInbox, kDirect };

// Most messages of one source in the last dispatch. Whole warps call it.
__device__ __forceinline__ int most_received(const Context& ctx, int chain) {
    int most = 0;
#pragma unroll 1
    for (int s = threadIdx.x & 31; s < ctx.shape.num_ranks; s += 32) {
        most = max(most, ctx.received(chain)[s]);
    }
    return __reduce_max_sync(kFullWarp, most);
}

// First half, the whole grid. An item is a part of one message; item i belongs to source i % R, so
// the references can be loaded before the counts. Pairs with combine_recv at the message's source.
template <int kThreads, OwnRows kOwn>
__device__ void combine_send(const Context& ctx, const RowParts& parts, const CombineInput& in,
                             int chain, uint64_t epoch) {
    const Shape& shape = ctx.shape;
    const int num_granules = shape.hidden / 4;
    const int items_per_slot = shape.num_ranks * parts.parts;
    const int num_items = most_received(ctx, chain) * items_per_slot;
#pragma unroll 1
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
        const int slot = parts.by_slot_items(item);
        const int within = item - slot * items_per_slot;
        const int part = ctx.by_ranks(within);
        const int source = within - part * shape.num_ranks;
        if (kOwn == OwnRows::kDirect && source == ctx.rank) continue;
        if (slot >= ctx.received(chain)[source]) continue;
        const int v = parts.vector(part, ctx.layout.combine_lines);
        if (v < 0) continue;
        const int g = first_granule(v);
        const Sum8 sum = reduce_rows(in, ctx.refs(chain, source, slot), shape.topk, g,
                                     !holds_tag(v) && g + 1 < num_granules, g < num_granules);
        ptx::store_line_vector(ctx.combine_at(source, chain, ctx.rank, slot) + 16 * v,
                               {sum.granule(0), holds_tag(v) ? epoch : sum.granule(1)});
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        uint64_t messages = 0;
#pragma unroll 1
        for (int s = 0; s < shape.num_ranks; ++s) messages += ctx.received(chain)[s];
        ctx.stats(chain)->bytes_combined += 2ULL * shape.hidden * messages;
    }
}

// This rank's own sum for its own message, rounded as if it had travelled.
__device__ __forceinline__ ptx::Vector own_vector(const Context& ctx, const CombineInput& in,
                                                  int chain, int slot, int v) {
    const int num_granules = ctx.shape.hidden / 4;
    const int g = first_granule(v);
    const Sum8 sum = reduce_rows(in, ctx.refs(chain, ctx.rank, slot), ctx.shape.topk, g,
                                 !holds_tag(v) && g + 1 < num_granules, g < num_granules);
    return {sum.granule(0), sum.granule(1)};
}

// One vector of the token's row: waits for it from every rank the token went to, and adds in rank
// order. Whole warps; false: gave up.
template <int kInFlight, OwnRows kOwn>
__device__ __forceinline__ bool gather_token(const Context& ctx, const CombineInput& in,
                                             Watch& watch, int chain, int token, int v,
                                             uint64_t epoch, Sum8& sum) {
    const int num_ranks = ctx.shape.num_ranks;
    const int32_t* sent = ctx.sent_slots(chain, token);
    ptx::Vector mine{};
    bool has_own = false;
    if (kOwn == OwnRows::kDirect) {
        const int slot = sent[ctx.rank];
        has_own = slot >= 0 && v >= 0;
        if (has_own) mine = own_vector(ctx, in, chain, slot, v);
    }
#pragma unroll 1
    for (int base = 0; base < num_ranks; base += kInFlight) {
        const uint8_t* from[kInFlight];
        int peers[kInFlight];
        ptx::Vector row[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int r = base + j;
            const bool direct = kOwn == OwnRows::kDirect && r == ctx.rank;
            const int slot = r < num_ranks && !direct ? sent[r] : -1;
            peers[j] = r;
            from[j] =
                slot >= 0 && v >= 0 ? ctx.combine_at(ctx.rank, chain, r, slot) + 16 * v : nullptr;
        }
        if (!await_vectors<kInFlight>(watch, from, peers, holds_tag(v), epoch, row)) return false;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            if (from[j] != nullptr) sum.add(1.0f, row[j].lo, row[j].hi);
            if (has_own && base + j == ctx.rank) sum.add(1.0f, mine.lo, mine.hi);
        }
    }
    return true;
}

// Second half, the whole grid. Padding rows and tokens without experts become zeros.
template <int kThreads, int kInFlight, OwnRows kOwn>
__device__ void combine_recv(const Context& ctx, const RowParts& parts, const CombineInput& in,
                             const CombineOutput& out, int chain, uint64_t epoch) {
    const Shape& shape = ctx.shape;
    const int rows = min(out.num_tokens, shape.max_tokens);
    const int valid = out.num_valid == nullptr ? rows : min(rows, *out.num_valid);
    const int num_granules = shape.hidden / 4;
    Watch watch{ctx, Op::kCombine, chain};
#pragma unroll 1
    for (int item = blockIdx.x; item < rows * parts.parts; item += gridDim.x) {
        const int token = parts.by_parts(item);
        const int v = parts.vector(item - token * parts.parts, ctx.layout.combine_lines);
        Sum8 sum;
        // Warps leave one by one: no barrier follows. The epoch still advances, the abort word
        // stops whatever comes next.
        if (token < valid &&
            !gather_token<kInFlight, kOwn>(ctx, in, watch, chain, token, v, epoch, sum)) {
            break;
        }
        if (v < 0) continue;
        const int g = first_granule(v);
        auto* row =
            reinterpret_cast<uint64_t*>(out.out + static_cast<int64_t>(token) * shape.hidden);
        if (g < num_granules) row[g] = sum.granule(0);
        if (!holds_tag(v) && g + 1 < num_granules) row[g + 1] = sum.granule(1);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        ctx.state(chain)->combined = epoch;  // the next dispatch reads it, a kernel boundary later
    }
}

}  // namespace ep

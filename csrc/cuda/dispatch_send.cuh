// Dispatch, first half: every token once to each rank that owns one of its experts.
//
// CTA 0 counts all tokens and announces the counts; the others quantise and push a stretch of
// tokens each. Sends never wait.
#pragma once

#include "cuda/lines.cuh"
#include "cuda/routes.cuh"
#include "ep/fp8.h"

namespace ep {

// Shared memory: message | rows[E] | messages[R] | slots[R].
struct SendScratch {
    uint64_t* message;
    RouteCounts counts;
    int32_t* slots;  // [R] where the current token goes; -1: not to this rank

    static EP_HD int64_t bytes(const Context& ctx) {
        return static_cast<int64_t>(ctx.layout.message.lines) * kLinePayload +
               4LL * (ctx.shape.num_experts + 2 * ctx.shape.num_ranks);
    }
    static __device__ SendScratch carve(uint8_t* smem, const Context& ctx) {
        uint8_t* p = smem + static_cast<int64_t>(ctx.layout.message.lines) * kLinePayload;
        auto* words = reinterpret_cast<int32_t*>(p);
        return {reinterpret_cast<uint64_t*>(smem),
                {words, words + ctx.shape.num_experts},
                words + ctx.shape.num_experts + ctx.shape.num_ranks};
    }
};

__device__ __forceinline__ int valid_tokens(const Shape& shape, const SendInput& in) {
    int n = min(in.num_tokens, shape.max_tokens);
    if (in.num_valid != nullptr) n = max(0, min(n, *in.num_valid));
    return n;
}

// Refuses a second dispatch before the combine of the first. One thread of the grid calls it.
__device__ inline void check_dispatch_order(const Context& ctx, int chain) {
    const ChainState* state = ctx.state(chain);
    if (state->dispatched == state->combined) return;
    fail(ctx, FaultCode::kSequence, Op::kDispatch, chain, -1, state->combined, state->dispatched);
}

// CTA 0: to every rank, how many messages and how many rows per expert it will get.
template <int kThreads>
__device__ void announce_counts(const Context& ctx, const SendInput& in, int chain, uint64_t epoch,
                                int num_tokens, SendScratch scratch) {
    const Shape& shape = ctx.shape;
    clear_counts(shape, scratch.counts);
    __syncthreads();
    count_tokens(ctx, in, num_tokens, scratch.counts);
    __syncthreads();

    const int local_experts = ctx.local_experts;
    const CountsLayout& layout = ctx.layout.counts;
    const int per_rank = layout.lines * kVectorsPerLine;
#pragma unroll 1
    for (int dst = 0, i = threadIdx.x; i < shape.num_ranks * per_rank; i += kThreads) {
        while (i >= (dst + 1) * per_rank) ++dst;
        const int v = i - dst * per_rank;
        const int32_t* rows = scratch.counts.rows + dst * local_experts;
        const auto granule = [&](int g) -> uint64_t {
            if (g == 0) return static_cast<uint32_t>(scratch.counts.messages[dst]);
            const int x = 2 * g - 2;
            const uint64_t lo = x < local_experts ? static_cast<uint32_t>(rows[x]) : 0;
            const uint64_t hi = x + 1 < local_experts ? static_cast<uint32_t>(rows[x + 1]) : 0;
            return lo | (hi << 32);
        };
        const int g = first_granule(v);
        ptx::store_line_vector(ctx.counts_at(dst, chain, epoch, ctx.rank) + 16 * v,
                               {granule(g), holds_tag(v) ? epoch : granule(g + 1)});
    }
    // Padding rows went nowhere: combine must not look for them.
#pragma unroll 1
    for (int i = num_tokens * shape.num_ranks + threadIdx.x;
         i < min(in.num_tokens, shape.max_tokens) * shape.num_ranks; i += kThreads) {
        ctx.sent_slots(chain, 0)[i] = -1;
    }
    if (threadIdx.x == 0) {
        uint64_t messages = 0;
#pragma unroll 1
        for (int r = 0; r < shape.num_ranks; ++r) messages += scratch.counts.messages[r];
        StepStats* stats = ctx.stats(chain);
        stats->messages_sent += messages;
        stats->bytes_dispatched += messages * ctx.layout.message.bytes;
    }
}

// A row in registers: 8 BF16 channels (16 bytes) a vector, vector j of the row at thread j %
// kThreads.
template <int kThreads>
struct RowRegisters {
    static constexpr int kMax = kMaxHidden / 8 / kThreads;
    uint4 v[kMax];

    __device__ __forceinline__ void load(const uint16_t* row, int hidden) {
        const auto* from = reinterpret_cast<const uint4*>(row);
#pragma unroll
        for (int j = 0; j < kMax; ++j) {
            const int i = j * kThreads + threadIdx.x;
            if (i < hidden / 8) v[j] = from[i];
        }
    }
};

__device__ __forceinline__ uint16_t pack_fp8x2(float a, float b) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

// Largest magnitude of eight channels; then over the sixteen threads that share a scale. (hidden is
// a multiple of 128, so all sixteen are there.)
__device__ __forceinline__ float group_amax(uint4 bf16x8) {
    // Magnitudes of BF16 order as integers: two a word, compared at once.
    constexpr uint32_t kMagnitudes = 0x7fff7fffu;
    uint32_t most = __vmaxu2(__vmaxu2(bf16x8.x & kMagnitudes, bf16x8.y & kMagnitudes),
                             __vmaxu2(bf16x8.z & kMagnitudes, bf16x8.w & kMagnitudes));
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        most = __vmaxu2(most, __shfl_xor_sync(kFullWarp, most, step));
    }
    const uint32_t top = max(most >> 16, most & 0xffffu);
    return fmaxf(bits_to_float(top << 16), kMinAmax);
}

__device__ __forceinline__ uint64_t quantise(uint4 bf16x8, float inverse) {
    const uint32_t words[4] = {bf16x8.x, bf16x8.y, bf16x8.z, bf16x8.w};
    uint64_t packed = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float lo = bits_to_float(words[j] << 16);
        const float hi = bits_to_float(words[j] & 0xffff0000u);
        const uint64_t two = pack_fp8x2(__fmul_rn(lo, inverse), __fmul_rn(hi, inverse));
        packed |= two << (16 * j);
    }
    return packed;
}

// The row part of the message: quantised, or as it is.
template <int kThreads>
__device__ __forceinline__ void stage_row(const Context& ctx, const RowRegisters<kThreads>& regs,
                                          uint64_t* message) {
    const int num_vectors = ctx.shape.hidden / 8;
    const bool fp8 = ctx.shape.wire == Wire::kFp8;
    auto* bytes = reinterpret_cast<uint8_t*>(message);
    auto* scales = reinterpret_cast<float*>(bytes + ctx.layout.message.scales);
#pragma unroll
    for (int j = 0; j < RowRegisters<kThreads>::kMax; ++j) {
        const int i = j * kThreads + threadIdx.x;
        if (i - static_cast<int>(threadIdx.x & 31) >= num_vectors) break;  // whole warps leave
        if (!fp8) {
            if (i < num_vectors) reinterpret_cast<uint4*>(message)[i] = regs.v[j];
            continue;
        }
        const float amax = group_amax(regs.v[j]);
        if (i >= num_vectors) continue;
        message[i] = quantise(regs.v[j], __fdiv_rn(kFp8Max, amax));
        if ((i & 15) == 0) scales[i / 16] = __fdiv_rn(amax, kFp8Max);
    }
}

// One warp: the header, and the token's slot at every rank; then counts the token.
__device__ inline void route_token(const Context& ctx, const SendInput& in, int chain, int token,
                                   const TokenRoute& route, SendScratch scratch) {
    const Shape& shape = ctx.shape;
    const int lane = threadIdx.x & 31;
    const Choice& c = route.choice;
    auto* bytes = reinterpret_cast<uint8_t*>(scratch.message);
    if (lane < shape.topk) {
        int32_t position = 0;
        if (c.expert >= 0) position = scratch.counts.rows[c.expert]++;
        auto* entries = reinterpret_cast<Entry*>(bytes + ctx.layout.message.entries);
        entries[lane] = {c.expert, position, route.weight};
    }
    if (lane == 0) {
        auto* header = reinterpret_cast<MessageHeader*>(bytes + ctx.layout.message.header);
        *header = {token, shape.topk};
    }
#pragma unroll 1
    for (int r = lane; r < shape.num_ranks; r += 32) scratch.slots[r] = -1;
    __syncwarp();
    if (c.leads_message) {
        const int dst = ctx.owner_of(c.expert);
        scratch.slots[dst] = scratch.counts.messages[dst]++;
    }
    __syncwarp();
    int32_t* sent = ctx.sent_slots(chain, token);
#pragma unroll 1
    for (int r = lane; r < shape.num_ranks; r += 32) sent[r] = scratch.slots[r];

    const unsigned dropped = __ballot_sync(kFullWarp, c.dropped);
    if (dropped != 0 && lane == __ffs(dropped) - 1) {
        const int64_t entry = static_cast<int64_t>(token) * shape.topk + lane;
        record_routing(ctx, chain, __popc(dropped), in.expert(entry));
    }
}

// CTA `index` of `num_ctas` that send rows: a stretch of consecutive tokens, so that what earlier
// tokens chose is counted once.
template <int kThreads>
__device__ void push_tokens(const Context& ctx, const SendInput& in, int chain, uint64_t epoch,
                            int num_tokens, int index, int num_ctas, SendScratch scratch) {
    const Shape& shape = ctx.shape;
    const int stretch = (num_tokens + num_ctas - 1) / num_ctas;
    const int first = index * stretch;
    const int last = min(num_tokens, first + stretch);
    if (first >= last) return;

    // In flight while earlier tokens are counted.
    RowRegisters<kThreads> regs;
    regs.load(in.x + first * in.row_stride, shape.hidden);
    const bool routes = threadIdx.x < 32;
    TokenRoute route{};
    if (routes) route = TokenRoute::read(ctx, in, first);
    clear_counts(shape, scratch.counts);
    __syncthreads();
    count_tokens(ctx, in, first, scratch.counts);
    __syncthreads();
#pragma unroll 1
    for (int t = first; t < last; ++t) {
        stage_row<kThreads>(ctx, regs, scratch.message);
        if (t + 1 < last) regs.load(in.x + (t + 1) * in.row_stride, shape.hidden);
        if (routes) {
            route_token(ctx, in, chain, t, route, scratch);
            if (t + 1 < last) route = TokenRoute::read(ctx, in, t + 1);
        }
        __syncthreads();
        // Starts with the next rank, so that ranks do not all write to the same one at once.
#pragma unroll 1
        for (int j = 1; j <= shape.num_ranks; ++j) {
            const int next = ctx.rank + j;
            const int dst = next < shape.num_ranks ? next : next - shape.num_ranks;
            const int slot = scratch.slots[dst];
            if (slot < 0) continue;
            push_message<kThreads>(ctx.dispatch_at(dst, chain, ctx.rank, slot), scratch.message,
                                   ctx.layout.message.lines, epoch);
        }
        __syncthreads();  // the message buffer is free again
    }
}

// The whole grid: CTA 0 announces, the others push.
template <int kThreads>
__device__ void dispatch_send(const Context& ctx, const SendInput& in, int chain, uint64_t epoch,
                              uint8_t* smem) {
    const SendScratch scratch = SendScratch::carve(smem, ctx);
    const int num_tokens = valid_tokens(ctx.shape, in);
    if (blockIdx.x == 0) {
        announce_counts<kThreads>(ctx, in, chain, epoch, num_tokens, scratch);
    } else {
        push_tokens<kThreads>(ctx, in, chain, epoch, num_tokens, blockIdx.x - 1, gridDim.x - 1,
                              scratch);
    }
}

}  // namespace ep

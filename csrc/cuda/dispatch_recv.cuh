// Dispatch, second half: counts give every row its place, then each message is pulled out of the
// inbox and fanned out to its local experts.
//
// Order of rows: by source rank, then by token. Nothing depends on arrival order or on the grid.
#pragma once

#include "cuda/lines.cuh"

namespace ep {

// Shared memory: message | base[R][L] | first_row[L + 1] | messages_before[R + 1] | rows[K] |
// total_rows.
struct RecvScratch {
    uint64_t* message;
    int32_t* base;             // rows of earlier sources for the expert
    int32_t* first_row;        // [L + 1] contiguous: first row of the expert
    int32_t* messages_before;  // [R + 1] messages of earlier sources
    int32_t* rows;             // [K] where the current message's entries go; -1: not here
    int32_t* total_rows;       // of all experts

    static EP_HD int64_t bytes(const Context& ctx) {
        const Shape& s = ctx.shape;
        return static_cast<int64_t>(ctx.layout.message.lines) * kLinePayload +
               4LL * (s.num_experts + s.num_local_experts() + 1 + s.num_ranks + 1 + s.topk + 1);
    }
    static __device__ RecvScratch carve(uint8_t* smem, const Context& ctx) {
        const Shape& s = ctx.shape;
        auto* p = reinterpret_cast<int32_t*>(smem + static_cast<int64_t>(ctx.layout.message.lines) *
                                                        kLinePayload);
        RecvScratch out{};
        out.message = reinterpret_cast<uint64_t*>(smem);
        out.base = p;
        out.first_row = out.base + s.num_experts;
        out.messages_before = out.first_row + s.num_local_experts() + 1;
        out.rows = out.messages_before + s.num_ranks + 1;
        out.total_rows = out.rows + s.topk;
        return out;
    }
};

// All counts messages into shared memory: base[s][x] = rows of source s, messages_before[s + 1] =
// its messages. Each warp takes 32 vectors of one source at a time. False on warps that gave up.
template <int kThreads>
__device__ bool pull_counts(const Context& ctx, int chain, uint64_t epoch, RecvScratch scratch) {
    const Shape& shape = ctx.shape;
    const int local_experts = shape.num_local_experts();
    const int num_vectors = ctx.layout.counts.lines * kVectorsPerLine;
    const int chunks = static_cast<int>(ceil_div(num_vectors, 32));
    const int lane = threadIdx.x & 31;
    const uint64_t start = blockIdx.x == 0 ? ptx::global_timer_ns() : 0;
    Watch watch{ctx, Op::kDispatch, chain};
    for (int task = threadIdx.x / 32; task < shape.num_ranks * chunks; task += kThreads / 32) {
        const int source = task / chunks;
        const int i = (task - source * chunks) * 32 + lane;
        const uint8_t* from[1] = {
            i < num_vectors ? ctx.counts_at(ctx.rank, chain, epoch, source) + 16 * i : nullptr};
        const int peers[1] = {source};
        ptx::Vector v[1];
        if (!await_vectors<1>(watch, from, peers, holds_tag(lane), epoch, v)) return false;
        if (blockIdx.x == 0 && i == 0) {
            ctx.stats(chain)->wait_ns[source] = ptx::global_timer_ns() - start;
        }
        if (from[0] == nullptr) continue;
        const auto put = [&](int g, uint64_t granule) {
            const int x = 2 * g - 2;
            if (g == 0) {
                scratch.messages_before[source + 1] = static_cast<int32_t>(granule);
                return;
            }
            int32_t* rows = scratch.base + source * local_experts;
            if (x < local_experts) rows[x] = static_cast<int32_t>(granule);
            if (x + 1 < local_experts) rows[x + 1] = static_cast<int32_t>(granule >> 32);
        };
        put(first_granule(i), v[0].lo);
        if (!holds_tag(i)) put(first_granule(i) + 1, v[0].hi);
    }
    return true;
}

// A peer's numbers index our memory: never beyond the inbox.
__device__ __forceinline__ bool clamp_count(const Context& ctx, int32_t& n) {
    if (n >= 0 && n <= ctx.shape.max_tokens) return false;
    n = n < 0 ? 0 : ctx.shape.max_tokens;
    return true;
}

// Prefix sums over the sources, in place. All threads; synchronises.
template <int kThreads>
__device__ void sum_counts(const Context& ctx, const RecvTarget& target, int chain, uint64_t epoch,
                           RecvScratch scratch) {
    const Shape& shape = ctx.shape;
    const int local_experts = shape.num_local_experts();
    const bool reports = blockIdx.x == 0;
    for (int x = threadIdx.x; x < local_experts; x += kThreads) {
        int32_t sum = 0;
        for (int s = 0; s < shape.num_ranks; ++s) {
            int32_t n = scratch.base[s * local_experts + x];
            if (clamp_count(ctx, n) && reports)
                fail(ctx, FaultCode::kCount, Op::kDispatch, chain, s, shape.max_tokens, n);
            scratch.base[s * local_experts + x] = sum;
            sum += n;
        }
        scratch.first_row[x] = sum;
        if (reports) {
            target.recv_count[x] = sum;
            atomicAdd(scratch.total_rows, sum);
        }
    }
    if (threadIdx.x == kThreads - 1) {
        int32_t sum = 0;
        scratch.messages_before[0] = 0;
        for (int s = 0; s < shape.num_ranks; ++s) {
            int32_t n = scratch.messages_before[s + 1];
            if (clamp_count(ctx, n) && reports)
                fail(ctx, FaultCode::kCount, Op::kDispatch, chain, s, shape.max_tokens, n);
            sum += n;
            scratch.messages_before[s + 1] = sum;
            if (reports) {
                ctx.received(chain)[s] = n;
                target.num_messages[s] = n;
            }
        }
    }
    __syncthreads();
}

// Contiguous: total rows per expert -> first row per expert. One warp scans; synchronises.
__device__ inline void place_experts(const Context& ctx, const RecvTarget& target,
                                     RecvScratch scratch) {
    const int local_experts = ctx.shape.num_local_experts();
    const int lane = threadIdx.x & 31;
    if (threadIdx.x < 32) {
        int32_t carried = 0;
        for (int base = 0; base < local_experts; base += 32) {
            const int x = base + lane;
            const int32_t own =
                x < local_experts
                    ? static_cast<int32_t>(round_up(scratch.first_row[x], target.alignment))
                    : 0;
            int32_t sum = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int32_t other = __shfl_up_sync(kFullWarp, sum, step);
                if (lane >= step) sum += other;
            }
            if (x < local_experts) scratch.first_row[x] = carried + sum - own;
            carried += __shfl_sync(kFullWarp, sum, 31);
        }
        if (lane == 0) scratch.first_row[local_experts] = carried;
    }
    __syncthreads();
    if (blockIdx.x != 0) return;
    for (int x = threadIdx.x; x <= local_experts; x += blockDim.x) {
        target.expert_offset[x] = scratch.first_row[x];
    }
}

// One warp: rows of the message's entries, and what combine needs to find them again.
__device__ inline void place_message(const Context& ctx, const RecvTarget& target, int chain,
                                     int source, int slot, RecvScratch scratch) {
    const Shape& shape = ctx.shape;
    const int lane = threadIdx.x & 31;
    const int local_experts = shape.num_local_experts();
    const auto* bytes = reinterpret_cast<const uint8_t*>(scratch.message);
    const auto* entries = reinterpret_cast<const Entry*>(bytes + ctx.layout.message.entries);
    const int message = scratch.messages_before[source] + slot;
    const bool active = lane < shape.topk;
    const Entry entry = active ? entries[lane] : Entry{-1, 0, 0.0f};
    const int x = entry.expert - ctx.rank * local_experts;
    const bool mine = active && x >= 0 && x < local_experts;

    int row = -1;
    if (mine && target.format != Format::kCompact) {
        row = scratch.base[source * local_experts + x] + entry.position;
        row += target.format == Format::kBatched ? x * shape.max_messages() : scratch.first_row[x];
    }
    if (target.format == Format::kCompact) {
        if (lane == 0) row = message;
        if (active) {
            const int64_t at = static_cast<int64_t>(message) * shape.topk + lane;
            target.topk_idx[at] = mine ? x : -1;
            target.topk_weights[at] = mine ? entry.weight : 0.0f;
        }
    }
    if (active) scratch.rows[lane] = row;

    const unsigned has_row = __ballot_sync(kFullWarp, row >= 0);
    RowRef* refs = ctx.refs(chain, source, slot);
    const int index = __popc(has_row & ((1u << lane) - 1));
    const float weight = target.format == Format::kCompact ? 1.0f : entry.weight;
    if (row >= 0) refs[index] = {row, weight};
    if (lane == 0 && __popc(has_row) < shape.topk) refs[__popc(has_row)] = {-1, 0.0f};
}

// Copies the message's row and scales to every place it has here. All threads.
template <int kThreads>
__device__ void fan_out(const Context& ctx, const RecvTarget& target, RecvScratch scratch) {
    const Shape& shape = ctx.shape;
    const int row_vectors = shape.row_bytes() / 16;
    const auto* row = reinterpret_cast<const uint4*>(scratch.message);
    const auto* scales = reinterpret_cast<const float*>(
        reinterpret_cast<const uint8_t*>(scratch.message) + ctx.layout.message.scales);
    auto* out = reinterpret_cast<uint4*>(target.x);
    const int num_entries = target.format == Format::kCompact ? 1 : shape.topk;
    for (int i = threadIdx.x; i < row_vectors; i += kThreads) {
        const uint4 v = row[i];
        for (int k = 0; k < num_entries; ++k) {
            const int32_t to = scratch.rows[k];
            if (to >= 0) out[static_cast<int64_t>(to) * row_vectors + i] = v;
        }
    }
    const int num_scales = shape.num_scales();
    for (int i = threadIdx.x; i < num_scales; i += kThreads) {
        for (int k = 0; k < num_entries; ++k) {
            const int32_t to = scratch.rows[k];
            if (to >= 0) target.scales[static_cast<int64_t>(to) * num_scales + i] = scales[i];
        }
    }
}

// Compact: rows past the last message choose no expert.
template <int kThreads>
__device__ void clear_unused_rows(const Context& ctx, const RecvTarget& target, int num_messages) {
    const int64_t end = static_cast<int64_t>(ctx.shape.max_messages()) * ctx.shape.topk;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t i =
        static_cast<int64_t>(num_messages) * ctx.shape.topk + blockIdx.x * kThreads + threadIdx.x;
    for (; i < end; i += step) target.topk_idx[i] = -1;
}

__device__ __forceinline__ int source_of(int message, const int32_t* messages_before) {
    int source = 0;
    while (messages_before[source + 1] <= message) ++source;
    return source;
}

__device__ inline void finish_dispatch(const Context& ctx, int chain, uint64_t epoch,
                                       int num_messages, int num_rows) {
    StepStats* stats = ctx.stats(chain);
    stats->messages_received += num_messages;
    stats->rows_received += num_rows;
    ctx.state(chain)->dispatched = epoch;  // combine reads it, a kernel boundary later
}

// The whole grid: message m is pulled by CTA m % gridDim.x.
template <int kThreads>
__device__ void dispatch_recv(const Context& ctx, const RecvTarget& target, int chain,
                              uint64_t epoch, uint8_t* smem) {
    const RecvScratch scratch = RecvScratch::carve(smem, ctx);
    const Shape& shape = ctx.shape;
    if (threadIdx.x == 0) *scratch.total_rows = 0;
    const bool counted = pull_counts<kThreads>(ctx, chain, epoch, scratch);
    if (__syncthreads_or(!counted)) return;
    sum_counts<kThreads>(ctx, target, chain, epoch, scratch);
    if (target.format == Format::kContiguous) place_experts(ctx, target, scratch);

    const int num_messages = scratch.messages_before[shape.num_ranks];
    Watch watch{ctx, Op::kDispatch, chain};
    for (int m = blockIdx.x; m < num_messages; m += gridDim.x) {
        const int source = source_of(m, scratch.messages_before);
        const int slot = m - scratch.messages_before[source];
        const bool pulled =
            pull_message<kThreads, 2>(watch, ctx.dispatch_at(ctx.rank, chain, source, slot),
                                      scratch.message, ctx.layout.message.lines, source, epoch);
        if (__syncthreads_or(!pulled)) return;
        if (threadIdx.x < 32) place_message(ctx, target, chain, source, slot, scratch);
        __syncthreads();
        fan_out<kThreads>(ctx, target, scratch);
        __syncthreads();
    }
    if (target.format == Format::kCompact) clear_unused_rows<kThreads>(ctx, target, num_messages);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        finish_dispatch(ctx, chain, epoch, num_messages, *scratch.total_rows);
    }
}

}  // namespace ep

// Counts of every source: waiting for them, and telling the caller what they say.
#pragma once

#include "cuda/recv_scratch.cuh"

namespace ep {

// A lane's vectors of the counts messages, which lie one behind the other.
template <int kVectors>
struct CountsLook {
    ptx::Vector v[kVectors];
    const uint8_t* slots;
    int first;  // vector; the lane's others are 32 apart
    unsigned asked = 0;  // bit u: for vector u

    __device__ __forceinline__ CountsLook(const View& view, const Turn& turn, int base)
        : slots(view.counts_in + (turn.epoch & 1) * view.num_ranks * view.counts_stride),
          first(base + static_cast<int>(threadIdx.x & 31)) {
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            const int i = first + 32 * u;
            if (i < view.num_ranks * view.counts_vectors) asked |= 1u << u;
        }
        if (turn.absent.maybe == 0) return;
#pragma unroll 1
        for (int u = 0; u < kVectors; ++u) {
            if (turn.absent.leaves_out(view, view.by_counts(first + 32 * u))) asked &= ~(1u << u);
        }
    }
    __device__ __forceinline__ bool asks(int u) const { return (asked >> u & 1) != 0; }

    __device__ __forceinline__ void load() {
        const uint8_t* from = slots + 16 * first;
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            if (asks(u)) v[u] = ptx::load_line_vector(from + 512 * u);
        }
    }
    // Of the lanes that hold tags: bit u if vector u was asked for and is not there.
    __device__ __forceinline__ unsigned lacking(uint64_t epoch) const {
        unsigned lacking = 0;
#pragma unroll
        for (int u = 0; u < kVectors; ++u) lacking |= v[u].hi != epoch ? 1u << u : 0;
        return holds_tag(threadIdx.x) ? lacking & asked : 0;
    }
    __device__ __forceinline__ Missing missing(const View& view, uint64_t epoch) const {
        const unsigned lacks = lacking(epoch);
        Missing missing{lacks != 0, -1, epoch, 0, nullptr};
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            if ((lacks >> u & 1) == 0) continue;
            const int i = first + 32 * u;
            missing.note(view.by_counts(i), v[u].hi, slots + 16 * i);
        }
        return missing;
    }
    // Into shared memory.
    __device__ __forceinline__ void keep(RecvScratch scratch) const {
        auto* to = reinterpret_cast<ptx::Vector*>(scratch.counts) + first;
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            if (asks(u)) to[32 * u] = v[u];
        }
    }
    // Tells the warps that wait for rows already how many messages come from the sources whose
    // first line is here.
    __device__ __forceinline__ void announce(const View& view, uint64_t epoch,
                                             RecvScratch scratch) const {
        static_assert(CountsLayout::kMessages == 0);
        const int tag_lane = static_cast<int>(threadIdx.x & 31) | (kVectorsPerLine - 1);
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
            const unsigned tags = __ballot_sync(kFullWarp, asks(u) && v[u].hi == epoch);
            const int source = view.by_counts(first + 32 * u);
            const bool is_first = source * view.counts_vectors == first + 32 * u;
            if (!asks(u) || !is_first || (tags >> tag_lane & 1) == 0) continue;
            const auto messages = static_cast<uint32_t>(v[u].lo);
            const uint32_t most = static_cast<uint32_t>(view.max_tokens);
            atomicExch(&scratch.announced[source], static_cast<int32_t>(min(messages, most)));
        }
    }
};

// CTA 0's router, while its clerk pulls: how long each source kept this rank waiting.
__device__ __noinline__ inline void measure_waits(const View& view, const RecvTarget& target,
                                                  Turn turn) {
    const uint8_t* slots = view.counts_in + (turn.epoch & 1) * view.num_ranks * view.counts_stride;
    const uint64_t start = ptx::global_timer_ns();
    Watch watch{view, Op::kDispatch};
#pragma unroll 1
    for (int base = 0; base < view.num_ranks; base += 32) {
        const int source = base + static_cast<int>(threadIdx.x & 31);
        const bool asked = source < view.num_ranks && !turn.absent.leaves_out(view, source);
        const uint8_t* from = slots + source * view.counts_stride + kLineBytes - 16;
        ptx::Vector vector{};
        uint64_t waited = 0;
        if (!await_tags(watch, asked ? from : nullptr, source, turn.epoch, start, vector, waited)) {
            return;
        }
        if (source >= view.num_ranks) continue;
        view.stats->wait_ns[source] = waited;  // 0: not asked
        if (asked && target.wait_ns != nullptr) target.wait_ns[source] += waited;
    }
}

// Counts messages into shared memory: by one warp, or by one of several, a look at a time. False:
// gave up.
template <int kVectors>
__device__ __forceinline__ bool pull_counts(const View& view, const Turn& turn, int warp, int warps,
                                            RecvScratch scratch) {
    if (turn.absent.maybe != 0 && warp == 0) clear_absent(view, turn.absent, scratch);
    Watch watch{view, Op::kDispatch};
    constexpr int kEach = 32 * kVectors;
#pragma unroll 1
    for (int base = kEach * warp; base < view.num_ranks * view.counts_vectors;
         base += kEach * warps) {
        CountsLook<kVectors> look(view, turn, base);
#pragma unroll 1
        while (true) {
            look.load();
            if (!__any_sync(kFullWarp, look.lacking(turn.epoch) != 0)) break;
            // In a long wait, others must know what came: they would blame who sends them nothing.
            const auto tell = [&] {
                look.announce(view, turn.epoch, scratch);
                return look.missing(view, turn.epoch);
            };
            if (watch.give_up(tell)) return false;
        }
        look.keep(scratch);
        look.announce(view, turn.epoch, scratch);
    }
    __syncwarp();
    return true;
}

// Batched: which rows of local expert x came from which source.
__device__ __noinline__ inline void note_ranges(const View& view, const RecvTarget& target, int x,
                                                RecvScratch scratch) {
    int64_t first = 0;
#pragma unroll 1
    for (int s = 0; s < view.num_ranks; ++s) {
        const int32_t rows = scratch.rows(view, s, x);
        target.layout_range[x * view.num_ranks + s] = (first << 32) | rows;
        first += rows;
    }
}

// CTA 0: every source must work under this rank's terms. A difference ends the group, and every
// wait that may not be served ends with it.
__device__ __forceinline__ void check_terms(const View& view, RowTerms rows, Absent absent,
                                            int source, RecvScratch scratch) {
    const uint32_t mask = absent.digest(view);
    const uint32_t theirs = scratch.word(view, source, RecvScratch::byte_of(CountsLayout::kTerms));
    if (suits(theirs, mask, rows) || absent.leaves_out(view, source)) return;
    fail(view, FaultCode::kTerms, Op::kDispatch, source, dispatch_terms(mask, rows),
         unmix_terms(theirs, mask, rows));
}

// The same for what it counts, which must be within the inbox.
__device__ __forceinline__ uint32_t checked_word(const View& view, int source, int word,
                                                 RecvScratch scratch) {
    const auto limit = static_cast<uint32_t>(view.max_tokens);
    const uint32_t n = scratch.word(view, source, RecvScratch::byte_of(word));
    if (n <= limit) return n;
    fail(view, FaultCode::kCount, Op::kDispatch, source, limit, n);
    return limit;
}

// CTA 0 tells the caller, and the statistics, what came. All threads; the router has the messages.
__device__ __forceinline__ void report_counts(const View& view, const RecvTarget& target,
                                              const Turn& turn, RecvScratch scratch) {
    const bool routes = this_warp() == kRouter;
    const int count = routes ? view.num_ranks : view.local_experts;
    const int first = routes ? static_cast<int>(threadIdx.x & 31) : send_thread();
    const int step = routes ? 32 : kRowThreads;
    if (this_warp() == kClerk) return;
    if (routes && first == 0) *target.routing.dispatched = turn.epoch;
#pragma unroll 1
    for (int base = 0; base < count; base += step) {
        const int i = base + first;
        uint32_t sum = 0;
        if (routes && i < count) {
            check_terms(view, target.rows(), turn.absent, i, scratch);
            sum = checked_word(view, i, CountsLayout::kMessages, scratch);
            target.routing.received[i] = target.num_messages[i] = static_cast<int32_t>(sum);
        } else if (i < count) {
#pragma unroll 1
            for (int s = 0; s < view.num_ranks; ++s) {
                sum += checked_word(view, s, CountsLayout::kRows + i, scratch);
            }
            target.recv_count[i] = static_cast<int32_t>(sum);
            if (target.cumulative_count != nullptr) target.cumulative_count[i] += sum;
            if (target.layout_range != nullptr) note_ranges(view, target, i, scratch);
        }
        const int all = __reduce_add_sync(kFullWarp, static_cast<int>(sum));
        StepStats& stats = *view.stats;
        if ((threadIdx.x & 31) != 0 || all == 0) continue;
        add_statistic(routes ? stats.messages_received : stats.rows_received, all);
    }
    if (target.format != Format::kContiguous) return;
#pragma unroll 1
    for (int x = send_thread(); x <= view.local_experts; x += kSendThreads) {
        target.expert_offset[x] = scratch.first_row[x];
    }
}

}  // namespace ep

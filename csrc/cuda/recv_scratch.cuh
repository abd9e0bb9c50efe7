// What a CTA that receives knows, in shared memory: counts of every source, and what follows from
// them.
#pragma once

#include "cuda/lines.cuh"
#include "cuda/roles.cuh"

namespace ep {

// The start of a message: header and entries, whatever K is.
inline constexpr int kHeadBytes = 32 / kVectorsPerLine * kLinePayload;
static_assert(sizeof(MessageHeader) + kMaxTopk * sizeof(Entry) <= kHeadBytes);
static_assert(kHeadBytes % 16 == 0);

// Where a message's rows go, as the router tells the others.
struct alignas(16) Landings {
    int32_t row[kMaxTopk];  // first, since four are read at a time
    int32_t first_scale[kMaxTopk];
    int32_t count;  // kNothing: no message
    int32_t gave_up;  // not 0: a warp did (all_found)
    int32_t end;  // items from here on are no messages, or kNoCounts: the clerk's word

    static constexpr int32_t kNothing = -1;
    static constexpr int32_t kNoCounts = -1;  // it gave up
};

// What the router waits for, once. Words that count arrivals and not barriers of some warps:
// compute-sanitizer's racecheck follows these (docs/benchmarks.md).
struct alignas(16) RouterWaits {
    uint64_t readers;  // every other warp has read the epoch
    uint64_t counts;  // every lane of the clerk: all counts are there, or it gave up

    __device__ __forceinline__ void prepare() {
        ptx::init_arrivals(&readers, kThreads / 32 - 1);
        ptx::init_arrivals(&counts, 32);
    }
};

// Shared memory: head of the router's message | landings | what it waits for | room for messages |
// counts, as they travel, tags and all, [R] | messages[R] | first_row[L + 1].
struct RecvScratch {
    uint64_t* head;
    Landings* landings;
    RouterWaits* waits;
    uint64_t* message;
    uint8_t* counts;
    int32_t* announced;  // messages of every source; kUnknown until its counts are here
    int32_t* first_row;  // contiguous: first row of the expert

    static constexpr int32_t kUnknown = 0x7fffffff;
    static constexpr int kWaitsAt = kHeadBytes + static_cast<int>(sizeof(Landings));
    static constexpr int kFront = kWaitsAt + static_cast<int>(sizeof(RouterWaits));
    static_assert(kFront % 16 == 0);

    static EP_HD int counts_at(int room) { return static_cast<int>(round_up(kFront + room, 16)); }
    static EP_HD int bytes(const View& view, int room) {
        return counts_at(room) + view.num_ranks * view.counts_stride +
               4 * (view.num_ranks + view.local_experts + 1);
    }
    static __device__ __forceinline__ RecvScratch carve(uint8_t* smem, const View& view, int room) {
        uint8_t* const counts = smem + counts_at(room);
        auto* announced = reinterpret_cast<int32_t*>(counts + view.num_ranks * view.counts_stride);
        return {reinterpret_cast<uint64_t*>(smem),
                reinterpret_cast<Landings*>(smem + kHeadBytes),
                reinterpret_cast<RouterWaits*>(smem + kWaitsAt),
                reinterpret_cast<uint64_t*>(smem + kFront),
                counts,
                announced,
                announced + view.num_ranks};
    }
    // Byte of a word of the counts, among their lines.
    static __device__ __forceinline__ int byte_of(int word) {
        const int g = word >> 1;
        return 8 * (g + g / kGranulesPerLine) + 4 * (word & 1);
    }
    __device__ __forceinline__ uint32_t word(const View& view, int source, int byte) const {
        return *reinterpret_cast<const uint32_t*>(counts + source * view.counts_stride + byte);
    }
    // Of a word that counts: a peer's numbers index our memory, never beyond the inbox. (CTA 0
    // reports those that would: checked_word.)
    __device__ __forceinline__ int32_t count(const View& view, int source, int byte) const {
        return static_cast<int32_t>(
            min(word(view, source, byte), static_cast<uint32_t>(view.max_tokens)));
    }
    // Rows that a source sends for local expert x.
    __device__ __forceinline__ int32_t rows(const View& view, int source, int x) const {
        return count(view, source, byte_of(CountsLayout::kRows + x));
    }
};

// All threads; the caller synchronises.
__device__ __forceinline__ void prepare_recv(const View& view, RecvScratch scratch) {
    if (threadIdx.x == 0) {
        scratch.landings->gave_up = 0;
        scratch.waits->prepare();
    }
#pragma unroll 1
    for (int s = threadIdx.x; s < view.num_ranks; s += kThreads) {
        scratch.announced[s] = RecvScratch::kUnknown;
    }
}

// The CTA meets: has every warp found what it waited for? Another barrier must lie before the next
// call. (Whether racecheck follows __syncthreads_or here as well was not tried.)
__device__ __forceinline__ bool all_found(bool found, RecvScratch scratch) {
    if (!found) scratch.landings->gave_up = 1;
    __syncthreads();
    return scratch.landings->gave_up == 0;
}

// One warp: ranks that are left out send nothing.
__device__ __noinline__ inline void clear_absent(const View& view, Absent absent,
                                                 RecvScratch scratch) {
#pragma unroll 1
    for (int s = 0; s < view.num_ranks; ++s) {
        if (!absent.leaves_out(view, s)) continue;
        auto* words = reinterpret_cast<uint32_t*>(scratch.counts + s * view.counts_stride);
#pragma unroll 1
        for (int i = threadIdx.x & 31; i < view.counts_stride / 4; i += 32) words[i] = 0;
        if ((threadIdx.x & 31) == 0) atomicExch(&scratch.announced[s], 0);
    }
}

// Contiguous: the first row of every expert, each a multiple of the alignment. One warp.
__device__ __noinline__ inline void place_experts(const View& view, const RecvTarget& target,
                                                  RecvScratch scratch) {
    const int local_experts = view.local_experts;
    const int lane = threadIdx.x & 31;
    int32_t carried = 0;
#pragma unroll 1
    for (int base = 0; base < local_experts; base += 32) {
        const int x = base + lane;
        int32_t own = 0;
#pragma unroll 1
        for (int s = 0; s < view.num_ranks && x < local_experts; ++s) {
            own += scratch.rows(view, s, x);
        }
        own = static_cast<int32_t>(round_up(own, target.alignment));
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
    __syncwarp();
}

// What is known so far. An atomic: the clerk may be writing it now.
__device__ __forceinline__ int32_t messages_so_far(int source, RecvScratch scratch) {
    int32_t n = 0;
    if ((threadIdx.x & 31) == 0) n = atomicOr(&scratch.announced[source], 0);
    return __shfl_sync(kFullWarp, n, 0);
}

// Most messages of one source. Whole warps.
__device__ __forceinline__ int most_messages(const View& view, RecvScratch scratch) {
    int most = 0;
#pragma unroll 1
    for (int s = threadIdx.x & 31; s < view.num_ranks; s += 32) {
        most = max(most, scratch.announced[s]);
    }
    return __reduce_max_sync(kFullWarp, most);
}

__device__ __forceinline__ int messages_before(int source, RecvScratch scratch) {
    int sum = 0;
#pragma unroll 1
    for (int s = 0; s < source; ++s) sum += scratch.announced[s];
    return sum;
}

}  // namespace ep

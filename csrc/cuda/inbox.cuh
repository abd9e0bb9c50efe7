// Taking messages out of the inbox: what there is to take, and waiting for it.
#pragma once

#include "cuda/recv_scratch.cuh"

namespace ep {

enum class Pulled { kMessage, kNothing, kGaveUp };

// A thread's vectors of one pass over a message by kWide threads, as last seen: by a warp, or by
// those that hold rows.
template <int U, int kWide>
struct Look {
    ptx::Vector v[U];

    static_assert(kWide == 32 || kWide == kRowThreads);
    static __device__ __forceinline__ int vector(int base, int u) {
        return base + u * kWide + static_cast<int>(kWide == 32 ? threadIdx.x & 31 : threadIdx.x);
    }

    __device__ __forceinline__ void load(const uint8_t* slot, int base, int num_vectors) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = vector(base, u);
            if (i < num_vectors) v[u] = ptx::load_line_vector(slot + 16 * i);
        }
    }
    __device__ __forceinline__ bool lacks(int base, int u, int num_vectors, uint64_t epoch) const {
        return vector(base, u) < num_vectors && holds_tag(threadIdx.x) && v[u].hi != epoch;
    }
    // Whole warps: is anything missing?
    __device__ __forceinline__ bool waits(int base, int num_vectors, uint64_t epoch) const {
        bool waiting = false;
#pragma unroll
        for (int u = 0; u < U; ++u) waiting |= lacks(base, u, num_vectors, epoch);
        return __any_sync(kFullWarp, waiting);
    }
    __device__ __forceinline__ Missing missing(const uint8_t* slot, int base, int num_vectors,
                                               int source, uint64_t epoch) const {
        Missing missing{false, source, epoch, 0, nullptr};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (!lacks(base, u, num_vectors, epoch)) continue;
            missing.waiting = true;
            missing.note(source, v[u].hi, slot + 16 * vector(base, u));
        }
        return missing;
    }
    __device__ __forceinline__ void lay_out(int base, int num_vectors, uint64_t* message) const {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = vector(base, u);
            if (i >= num_vectors) continue;
            const int g = first_granule(i);
            message[g] = v[u].lo;
            if (!holds_tag(i)) message[g + 1] = v[u].hi;
        }
    }
};

__device__ __forceinline__ const uint8_t* slot_address(const View& view, int source, int slot,
                                                       uint64_t epoch) {
    return view.dispatch_in + view.dispatch_at(epoch) +
           static_cast<int64_t>(source * view.max_tokens + slot) * view.message_stride;
}

// Until all tags are there. One warp, which has looked; false: gave up.
template <class Look>
__device__ __forceinline__ bool await_look(Watch& watch, Look& look, const uint8_t* from, int base,
                                           int num_vectors, int source, uint64_t epoch) {
#pragma unroll 1
    while (true) {
        if (!look.waits(base, num_vectors, epoch)) return true;
        const auto tell = [&] { return look.missing(from, base, num_vectors, source, epoch); };
        if (!wait_for_more(watch, tell)) return false;
        look.load(from, base, num_vectors);
    }
}

// What a CTA takes next: a part of a message, one of 2^`bits`. Source by source within a slot.
struct InboxItem {
    int slot;
    int source;
    int part;

    static __device__ __forceinline__ InboxItem of(const View& view, int index, int bits) {
        const int message = index >> bits;
        const int slot = view.by_ranks(message);
        return {slot, message - slot * view.num_ranks, index - (message << bits)};
    }
};

// The vectors of a message that are a part of it, and of its row. Parts are pairs of lines, which
// hold whole vectors of the row; header, entries and scales are in the first (the launcher sees to
// it).
struct Section {
    int begin;
    int end;
    int row_begin;
    int row_end;

    static __device__ __forceinline__ Section of(const View& view, int part, int bits) {
        const int each = view.part_lines(bits) * kVectorsPerLine;
        const int begin = min(part * each, view.message_vectors);
        const int end = min(begin + each, view.message_vectors);
        return {begin, end, max(0, row_vector(view, begin)),
                min(row_vector(view, end), view.row_vectors)};
    }

  private:
    static __device__ __forceinline__ int row_vector(const View& view, int vector) {
        return (vector / kVectorsPerLine * kLinePayload - view.row_offset) / 16;
    }
};

// Waits for vectors [begin, end) of the message in a slot, or for the news that the source sends
// fewer. Lays them out in shared memory. `few`: see wait_for_more. Warp by warp; the caller
// synchronises.
template <int U, int kWide>
__device__ __forceinline__ Pulled pull_slot(const View& view, Watch& watch, const InboxItem& item,
                                            int begin, int end, uint64_t epoch, bool few,
                                            RecvScratch scratch, uint64_t* message) {
    const int source = item.source, slot = item.slot;
    const uint8_t* from = slot_address(view, source, slot, epoch);
#pragma unroll 1
    for (int base = begin; base < end; base += U * kWide) {
        Look<U, kWide> look;
#pragma unroll 1
        while (true) {
            look.load(from, base, end);
            // While the loads are under way.
            const int32_t announced = messages_so_far(source, scratch);
            if (!look.waits(base, end, epoch)) break;
            if (slot >= announced) return Pulled::kNothing;
            const auto tell = [&] { return look.missing(from, base, end, source, epoch); };
            // Once announced it will come; until then both must be watched.
            const bool patient = announced != RecvScratch::kUnknown;
            if (!wait_for_more(watch, tell, few || !patient)) return Pulled::kGaveUp;
        }
        look.lay_out(base, end, message);
    }
    return Pulled::kMessage;
}

}  // namespace ep

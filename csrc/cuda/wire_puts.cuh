// The kernels that put, over any transport: `Puts` copies bytes to a rank's region and sets a
// signal word there behind them.
//
// Puts::warp(rank, put, epoch) and Puts::block(rank, put, epoch) start one; Puts::finish(), called
// by all threads behind the last, returns when the bytes may be overwritten here.
#pragma once

#include "cuda/ptx.cuh"
#include "ep/wire.h"

namespace ep::wire {

inline constexpr int kPutThreads = 512;

struct AnnounceArgs {
    Region region;
    Message message;
    int32_t rank;
    uint8_t* mine;  // this rank's region
    const Counters* counters;
    const uint64_t* abort;  // this rank's own: after a fault nothing is put, and peers find out
};

struct PutArgs {
    Region region;
    Transfer transfer;
    uint8_t* mine;
    const Counters* counters;
    const uint64_t* abort;
};

// Whole CTAs.
__device__ __forceinline__ bool gave_up(const uint64_t* abort) {
    const uint64_t word = threadIdx.x == 0 ? ptx::load_relaxed_sys(abort) : 0;
    return __syncthreads_or(word != 0) != 0;
}

// One CTA. Pairs with the await_messages kernel of every rank.
template <class Puts>
__device__ __forceinline__ void announce(const AnnounceArgs& a, const Puts& puts) {
    if (gave_up(a.abort)) return;
    const Region& r = a.region;
    const uint64_t epoch = a.counters->exchanged + 1;
    const int words = a.message.num_experts == 0 ? 0 : r.words(a.message.num_experts);
    auto* outgoing = reinterpret_cast<int32_t*>(a.mine + r.outgoing);
    for (int i = threadIdx.x; i < words; i += kPutThreads) {
        outgoing[i] = a.message.word(r.place, i);
    }
    __threadfence_system();  // a network card reads it as well
    __syncthreads();
#pragma unroll 1
    for (int d = static_cast<int>(threadIdx.x >> 5); d < r.place.num_ranks();
         d += kPutThreads / 32) {
        puts.warp(
            d, {r.outgoing, r.message(epoch, a.rank), 4LL * words, r.message_signal(epoch, a.rank)},
            epoch);
    }
    puts.finish();
}

// Any grid: a CTA takes a channel of a node at a time. Pairs with await_rows of the rail's ranks.
template <class Puts>
__device__ __forceinline__ void put_rows(const PutArgs& a, const Puts& puts) {
    if (gave_up(a.abort)) return;
    const Place& p = a.region.place;
    const bool out = a.transfer.way == Way::kOut;
    const uint64_t epoch = (out ? a.counters->crossed : a.counters->returned) + 1;
    const int others = p.num_nodes - 1;
#pragma unroll 1
    for (int item = static_cast<int>(blockIdx.x); item < others * kChannels;
         item += static_cast<int>(gridDim.x)) {
        int node = p.node + 1 + item % others;  // not all to node 0 first
        if (node >= p.num_nodes) node -= p.num_nodes;
        const int channel = item / others;
#pragma unroll 1
        for (int piece = 0; piece < pieces_of(a.transfer.way); ++piece) {
            puts.block(p.rank_of(node, p.local), put_of(a.region, a.transfer, node, channel, piece),
                       epoch);
        }
    }
    puts.finish();
}

}  // namespace ep::wire

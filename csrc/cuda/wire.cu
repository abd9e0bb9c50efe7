#include "cuda/wire.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/lines.cuh"
#include "cuda/normal_steps.cuh"
#include "cuda/wire_puts.cuh"

namespace ep {
namespace wire {
namespace {

using normal::await_words;
using normal::Group;
using normal::may_run;

// Copies over mapped memory. Bytes and addresses are multiples of 4; of 16 where rows are.
struct MappedPuts {
    uint8_t* regions[kMaxRanks];
    const uint8_t* mine;

    __device__ __forceinline__ void copy(int rank, const Put& put, int thread, int threads) const {
        uint8_t* to = regions[rank] + put.to;
        const uint8_t* from = mine + put.from;
        const auto both = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
        if (((both | static_cast<uintptr_t>(put.bytes)) & 15) == 0) {
#pragma unroll 4
            for (int64_t i = thread; i < put.bytes / 16; i += threads) {
                reinterpret_cast<ptx::Vector*>(to)[i] =
                    reinterpret_cast<const ptx::Vector*>(from)[i];
            }
            return;
        }
#pragma unroll 4
        for (int64_t i = thread; i < put.bytes / 4; i += threads) {
            reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
        }
    }
    __device__ __forceinline__ void tell(int rank, const Put& put, uint64_t epoch) const {
        __threadfence_system();
        ptx::store_release_sys(reinterpret_cast<uint64_t*>(regions[rank] + put.signal), epoch);
    }
    __device__ __forceinline__ void warp(int rank, const Put& put, uint64_t epoch) const {
        copy(rank, put, normal::lane_of(), 32);
        __syncwarp();
        if (normal::lane_of() == 0) tell(rank, put, epoch);  // acquired by await_words
    }
    __device__ __forceinline__ void block(int rank, const Put& put, uint64_t epoch) const {
        copy(rank, put, static_cast<int>(threadIdx.x), kPutThreads);
        __syncthreads();
        if (threadIdx.x == 0) tell(rank, put, epoch);
    }
    __device__ __forceinline__ void finish() const {}
};

struct MappedAnnounceArgs {
    AnnounceArgs announce;
    MappedPuts puts;
};
struct MappedPutArgs {
    PutArgs put;
    MappedPuts puts;
};

__global__ void __launch_bounds__(kPutThreads)
    wire_announce_kernel(const __grid_constant__ MappedAnnounceArgs a) {
    announce(a.announce, a.puts);
}
__global__ void __launch_bounds__(kPutThreads)
    wire_put_kernel(const __grid_constant__ MappedPutArgs a) {
    put_rows(a.put, a.puts);
}

struct AwaitArgs {
    Region region;
    const uint8_t* mine;
    Counters* counters;
    int32_t num_experts;
    Way way;
    Group whole;
    Group rail;
};
static_assert(sizeof(AwaitArgs) <= 4096);

__device__ __forceinline__ const uint64_t* signal(const AwaitArgs& a, int64_t offset) {
    return reinterpret_cast<const uint64_t*>(a.mine + offset);
}

// Whole CTAs: one word for each index below `count`. word(i) may be nullptr. False: gave up.
template <class Word, class Peer>
__device__ __forceinline__ bool await_all(const View& view, Op op, int count, uint64_t epoch,
                                          Word word, Peer peer) {
    Watch watch{view, op};
    bool ok = true;
#pragma unroll 1
    for (int base = 32 * normal::warp_of(); ok && base < count; base += kPutThreads) {
        const int i = base + normal::lane_of();
        ok = await_words(watch, i < count ? word(i) : nullptr, i < count ? peer(i) : -1, epoch);
    }
    return __syncthreads_or(!ok) == 0;
}

// Whole CTAs: the notify message of `source`, as if it had stored its lines here itself.
template <class Word>
__device__ __forceinline__ void write_lines(const Group& group, int source, uint64_t epoch,
                                            int num_words, Word word) {
    uint8_t* slot = group.notify_slot(group.rank(), epoch, source);
    const auto granule = [&](int g) {
        const uint32_t lo = 2 * g < num_words ? static_cast<uint32_t>(word(2 * g)) : 0;
        const uint32_t hi = 2 * g + 1 < num_words ? static_cast<uint32_t>(word(2 * g + 1)) : 0;
        return static_cast<uint64_t>(hi) << 32 | lo;
    };
    const int vectors = lines_for(4LL * num_words) * kVectorsPerLine;
    for (int v = threadIdx.x; v < vectors; v += kPutThreads) {
        const int g = first_granule(v);
        ptx::store_line_vector(slot + 16 * v, {granule(g), holds_tag(v) ? epoch : granule(g + 1)});
    }
}

__device__ __forceinline__ void deliver(const AwaitArgs& a, uint64_t epoch) {
    const Place& p = a.region.place;
    const int ranks = p.num_ranks(), me = a.whole.rank();
    const int of_rank = a.num_experts / ranks, of_node = a.num_experts / p.num_nodes;
    const uint64_t to_whole = a.whole.state->notified + 1, to_rail = a.rail.state->notified + 1;
#pragma unroll 1
    for (int s = 0; s < ranks; ++s) {
        const auto* words = reinterpret_cast<const int32_t*>(a.mine + a.region.message(epoch, s));
        const int32_t* per_node = words + ranks;
        const int32_t* experts = per_node + p.num_nodes;
        write_lines(a.whole, s, to_whole, ranks + of_rank, [&](int i) {
            return i < ranks ? words[i] : experts[me * of_rank + i - ranks];
        });
        if (s % p.ranks_per_node != p.local) continue;
        write_lines(a.rail, s / p.ranks_per_node, to_rail, p.num_nodes + of_node, [&](int i) {
            return i < p.num_nodes ? per_node[i] : experts[p.node * of_node + i - p.num_nodes];
        });
    }
}

// The rail's next dispatch writes to mirrors, and waits for nobody.
__device__ __forceinline__ void grant_out(const AwaitArgs& a) {
    const Group& rail = a.rail;
    const int n = static_cast<int>(threadIdx.x), me = rail.rank();
    if (n >= rail.num_ranks() || n == me) return;
    const uint64_t epoch = rail.state->dispatched + 1;
    normal::Credit* line = rail.credit(rail.control.dispatch_credit_offset, me, n);
    line->offset = a.region.mirror(n);
    line->rows = a.region.max_tokens;
    ptx::store_release_sys(&line->epoch, epoch);  // acquired by this rank's own kernels
    ptx::store_release_sys(rail.done(me, n), normal::done_word(epoch));
}

// The rail's next combine finds all rows in its inbox, and sends none.
__device__ __forceinline__ void grant_home(const AwaitArgs& a) {
    const Group& rail = a.rail;
    const int me = rail.rank(), all = rail.num_ranks() * normal::kNumChunks;
    const uint64_t epoch = rail.state->combined + 1;
    for (int i = threadIdx.x; i < all; i += kPutThreads) {
        const int n = i / normal::kNumChunks;
        if (n != me) {
            ptx::store_release_sys(rail.chunk(me, n, i - n * normal::kNumChunks), epoch);
        }
    }
}

// One CTA.
__global__ void __launch_bounds__(kPutThreads)
    wire_await_messages_kernel(const __grid_constant__ AwaitArgs a) {
    if (!may_run(a.whole, Op::kNormalNotify)) return;
    const uint64_t epoch = a.counters->exchanged + 1;
    const bool ok = await_all(
        a.whole.waits, Op::kNormalNotify, a.whole.num_ranks(), epoch,
        [&](int s) { return signal(a, a.region.message_signal(epoch, s)); },
        [](int s) { return s; });
    if (!ok) return;
    if (a.num_experts != 0) deliver(a, epoch);
    grant_out(a);
    if (threadIdx.x == 0) a.counters->exchanged = epoch;  // all have read it: the barrier
}

// One CTA.
__global__ void __launch_bounds__(kPutThreads)
    wire_await_rows_kernel(const __grid_constant__ AwaitArgs a) {
    const Op op = a.way == Way::kOut ? Op::kNormalDispatch : Op::kNormalCombine;
    if (!may_run(a.rail, op)) return;
    uint64_t& counter = a.way == Way::kOut ? a.counters->crossed : a.counters->returned;
    const uint64_t epoch = counter + 1;
    const int pieces = pieces_of(a.way), of_node = kChannels * pieces;
    const bool ok = await_all(
        a.rail.waits, op, a.rail.num_ranks() * of_node, epoch,
        [&](int i) -> const uint64_t* {
            const int n = i / of_node, channel = i % of_node / pieces;
            if (n == a.rail.rank()) return nullptr;
            return signal(a, a.region.row_signal(a.way, n, channel, i % pieces));
        },
        [&](int i) { return i / of_node; });
    if (!ok) return;
    if (a.way == Way::kHome) grant_home(a);
    if (threadIdx.x == 0) counter = epoch;
}

struct TablesArgs {
    Region region;
    Tables tables;
    Group rail;
};

__global__ void __launch_bounds__(kPutThreads)
    wire_tables_kernel(const __grid_constant__ TablesArgs a) {
    const Place& p = a.region.place;
    const Tables& t = a.tables;
    const int i = static_cast<int>(blockIdx.x * kPutThreads + threadIdx.x);
    if (i < p.num_nodes * p.num_nodes) {
        const int s = i / p.num_nodes, d = i % p.num_nodes;
        if (!plausible(a.region, t.rail_prefix, s, d)) {
            fail(a.rail.waits, FaultCode::kCount, Op::kNormalNotify, s,
                 static_cast<uint64_t>(a.region.max_tokens),
                 static_cast<uint32_t>(t.rail_prefix[i]));
        }
        t.out_prefix[i] = out_entry(p, t.rail_prefix, s, d);
        t.home_prefix[i] = home_entry(p, t.rail_prefix, s, d);
    }
    const int32_t first = normal::tokens_before(t.rail_prefix, p.num_nodes, p.node, p.node);
    if (i < t.num_tokens) t.home_order[i] = first + i;
}

template <class Args>
void launch(void (*kernel)(Args), int64_t grid, StreamHandle stream, const Args& args) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(1, grid)));
    config.blockDim = dim3(kPutThreads);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    EP_CUDA(cudaLaunchKernelEx(&config, kernel, args));
}

// Loads a kernel, so that no launch has to while another rank waits.
template <class Args>
void load(void (*kernel)(Args)) {
    cudaFuncAttributes loaded{};
    EP_CUDA(cudaFuncGetAttributes(&loaded, reinterpret_cast<const void*>(kernel)));
}

}  // namespace
}  // namespace wire

CudaWire::CudaWire(const CudaNormal& whole, const CudaNormal& rail, const wire::Region& region,
                   const std::vector<std::uintptr_t>& regions, std::uintptr_t counters, int device)
    : whole_(whole),
      rail_(rail),
      region_(region),
      own_(region.place.rank_of(region.place.node, region.place.local)),
      counters_(reinterpret_cast<wire::Counters*>(counters)),
      device_(device) {
    const int ranks = region.place.num_ranks();
    if (ranks > kMaxRanks || regions.size() != static_cast<size_t>(ranks)) {
        throw std::invalid_argument("give a region for each of " + std::to_string(ranks) +
                                    " ranks, 0 where it is out of reach");
    }
    for (int r = 0; r < ranks; ++r) regions_[r] = reinterpret_cast<uint8_t*>(regions[r]);
    const DeviceGuard guard(device_);
    wire::load(wire::wire_announce_kernel);
    wire::load(wire::wire_put_kernel);
    wire::load(wire::wire_await_messages_kernel);
    wire::load(wire::wire_await_rows_kernel);
    wire::load(wire::wire_tables_kernel);
}

std::uintptr_t CudaWire::abort_word() const {
    const normal::Group& group = whole_.group();
    return reinterpret_cast<std::uintptr_t>(group.waits.peer[group.rank()] +
                                            HeapLayout::kAbortOffset);
}

void CudaWire::announce(const wire::Message& message, StreamHandle stream) const {
    const DeviceGuard guard(device_);
    wire::MappedAnnounceArgs args{{region_, message, own_, regions_[own_], counters_,
                                   reinterpret_cast<const uint64_t*>(abort_word())},
                                  {{}, regions_[own_]}};
    std::copy_n(regions_, kMaxRanks, args.puts.regions);
    wire::launch(wire::wire_announce_kernel, 1, stream, args);
}

void CudaWire::put(const wire::Transfer& transfer, int num_sms, StreamHandle stream) const {
    const DeviceGuard guard(device_);
    wire::MappedPutArgs args{{region_, transfer, regions_[own_], counters_,
                              reinterpret_cast<const uint64_t*>(abort_word())},
                             {{}, regions_[own_]}};
    std::copy_n(regions_, kMaxRanks, args.puts.regions);
    const int64_t items = (region_.place.num_nodes - 1) * wire::kChannels;
    wire::launch(wire::wire_put_kernel, std::min<int64_t>(num_sms, items), stream, args);
}

void CudaWire::await_messages(int num_experts, StreamHandle stream) const {
    const DeviceGuard guard(device_);
    wire::launch(wire::wire_await_messages_kernel, 1, stream,
                 wire::AwaitArgs{region_, regions_[own_], counters_, num_experts, wire::Way::kOut,
                                 whole_.group(), rail_.group()});
}

void CudaWire::tables(const wire::Tables& tables, StreamHandle stream) const {
    const DeviceGuard guard(device_);
    const int64_t items =
        std::max(region_.place.num_nodes * region_.place.num_nodes, tables.num_tokens);
    wire::launch(wire::wire_tables_kernel, ceil_div(items, wire::kPutThreads), stream,
                 wire::TablesArgs{region_, tables, rail_.group()});
}

void CudaWire::await_rows(wire::Way way, StreamHandle stream) const {
    const DeviceGuard guard(device_);
    wire::launch(
        wire::wire_await_rows_kernel, 1, stream,
        wire::AwaitArgs{region_, regions_[own_], counters_, 0, way, whole_.group(), rail_.group()});
}

void CudaWire::reset() const {
    const DeviceGuard guard(device_);
    EP_CUDA(cudaMemset(regions_[own_], 0, static_cast<size_t>(region_.messages)));
    EP_CUDA(cudaMemset(counters_, 0, sizeof(*counters_)));
    EP_CUDA(cudaDeviceSynchronize());
}

}  // namespace ep

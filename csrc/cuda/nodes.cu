#include "cuda/nodes.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/nodes_steps.cuh"

namespace ep {
namespace nodes {
namespace {

constexpr int kThreadsHere = 512;
constexpr int kRowsOfCta = 512;
constexpr int kMostPlacingCtas = 32;
constexpr int kMostOrderingCtas = 32;
constexpr int kInFlight = 8;
constexpr unsigned kWarp = 0xffffffffu;

struct Args {
    Place place;
    Tables tables;
    int32_t placing;  // CTAs that place rows; the first of the others writes the prefixes too
    int32_t stretch;  // rows of each of them
};

// One rank of the node for a thread.
__device__ __forceinline__ void write_prefixes(const Place& p, const Tables& t) {
    const int ranks = p.ranks_per_node, d = static_cast<int>(threadIdx.x);
    if (d >= ranks) return;
    int32_t sum = 0;
    for (int l = 0; l < ranks; ++l) {
        sum += sent_on_before(p, t, p.num_nodes, l, d);
        t.node_prefix[l * ranks + d] = sum;
    }
    for (int l = 0; l < ranks; ++l) t.reach[l * ranks + d] = l < p.local ? 0 : sum;
}

// Whole CTAs: rows before `end` that go to each rank. A thread stays with one rank.
__device__ __forceinline__ void count_before(const Tables& t, int ranks, int64_t end,
                                             int32_t* counts) {
    for (int d = threadIdx.x; d < ranks; d += kThreadsHere) counts[d] = 0;
    __syncthreads();
    const int step = kThreadsHere / ranks * ranks, first = static_cast<int>(threadIdx.x);
    if (first < step) {
        int32_t count = 0;
#pragma unroll 8
        for (int64_t i = first; i < end * ranks; i += step) count += t.goes[i] != 0;
        if (count != 0) atomicAdd(&counts[first % ranks], count);
    }
    __syncthreads();
}

// One warp: the rows of its CTA that go to rank d.
__device__ __forceinline__ void place_rows_of(const Place& p, const Tables& t, int d, int64_t begin,
                                              int64_t end, int32_t sent, const int32_t* shifts,
                                              const int32_t* ends) {
    const int ranks = p.ranks_per_node, lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll 1
    for (int64_t base = begin; base < end; base += 32 * kInFlight) {
        bool goes[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int64_t row = base + 32 * j + lane;
            goes[j] = row < end && t.goes[row * ranks + d] != 0;
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int64_t row = base + 32 * j + lane;
            const unsigned who = __ballot_sync(kWarp, goes[j]);
            const int32_t position = sent + __popc(who & ((1u << lane) - 1));
            sent += __popc(who);
            if (row >= end) continue;
            int node = 0;
            while (node + 1 < p.num_nodes && row >= ends[node]) ++node;
            t.position[row * ranks + d] = goes[j] ? position : -1;
            t.target[row * ranks + d] = goes[j] ? position + shifts[node * ranks + d] : -1;
        }
    }
}

__device__ __forceinline__ void place_rows(const Args& a) {
    __shared__ int32_t counts[kMaxRanks], shifts[kMaxRanks], ends[kMaxRanks];
    const Place& p = a.place;
    const Tables& t = a.tables;
    const int ranks = p.ranks_per_node;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.stretch;
    const int64_t end = min(static_cast<int64_t>(t.rail_rows), begin + a.stretch);
    for (int i = threadIdx.x; i < p.num_ranks(); i += kThreadsHere) {
        shifts[i] = shift(p, t, i / ranks, i % ranks);
    }
    for (int n = threadIdx.x; n < p.num_nodes; n += kThreadsHere) ends[n] = rail_end(p, t, n);
    count_before(t, ranks, begin, counts);
#pragma unroll 1
    for (int d = static_cast<int>(threadIdx.x >> 5); d < ranks; d += kThreadsHere / 32) {
        place_rows_of(p, t, d, begin, end, counts[d], shifts, ends);
    }
}

__device__ __forceinline__ void write_order(const Args& a) {
    __shared__ Stretch stretches[kMaxRanks];
    const Place& p = a.place;
    const Tables& t = a.tables;
    for (int j = threadIdx.x; j < p.num_ranks(); j += kThreadsHere) {
        const int l = j / p.num_nodes, n = j % p.num_nodes;
        int32_t end = sent_on_before(p, t, n + 1, l, p.local);
        for (int m = 0; m < l; ++m) end += sent_on_before(p, t, p.num_nodes, m, p.local);
        stretches[j] = {end, first_row(p, t, n, l, p.local)};
    }
    __syncthreads();
    const int step = static_cast<int>(gridDim.x - a.placing) * kThreadsHere;
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(blockIdx.x - a.placing) * kThreadsHere + threadIdx.x;
         i < t.num_rows; i += step) {
        t.order[i] = row_at(stretches, p.num_ranks(), i);
    }
}

__global__ void __launch_bounds__(kThreadsHere) node_tables_kernel(const __grid_constant__ Args a) {
    const int cta = static_cast<int>(blockIdx.x);
    if (cta < a.placing) return place_rows(a);
    if (cta == a.placing) write_prefixes(a.place, a.tables);
    write_order(a);
}

__global__ void __launch_bounds__(kByNodeThreads)
    by_node_kernel(const __grid_constant__ ByNodeArgs a) {
    by_node(a);
}

void check(const Place& place) {
    if (place.num_nodes < 1 || place.ranks_per_node < 1 || place.num_ranks() > kMaxRanks) {
        throw std::invalid_argument(std::to_string(place.num_nodes) + " nodes of " +
                                    std::to_string(place.ranks_per_node) +
                                    " ranks; there must be 1 to 72 ranks in all");
    }
}

template <class Args>
void launch(void (*kernel)(Args), int64_t grid, int threads, StreamHandle stream,
            const Args& args) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    EP_CUDA(cudaLaunchKernelEx(&config, kernel, args));
}

int ctas_for(int64_t items, int of_cta, int most) {
    return static_cast<int>(std::min<int64_t>(ceil_div(items, of_cta), most));
}

}  // namespace
}  // namespace nodes

void launch_by_node(const nodes::Place& place, const nodes::ByNode& by_node, int device,
                    StreamHandle stream) {
    nodes::check(place);
    const DeviceGuard guard(device);
    EP_CUDA(cudaMemsetAsync(by_node.tokens_per_node, 0, sizeof(int32_t) * place.num_nodes,
                            reinterpret_cast<cudaStream_t>(stream)));
    const int64_t ctas = ceil_div(by_node.num_tokens, nodes::kByNodeThreads);
    if (ctas == 0) return;
    nodes::launch(nodes::by_node_kernel, ctas, nodes::kByNodeThreads, stream,
                  nodes::ByNodeArgs{place, by_node});
}

void launch_node_tables(const nodes::Place& place, const nodes::Tables& tables, int device,
                        StreamHandle stream) {
    nodes::check(place);
    const DeviceGuard guard(device);
    const int placing =
        nodes::ctas_for(tables.rail_rows, nodes::kRowsOfCta, nodes::kMostPlacingCtas);
    const int ordering = std::max(
        1, nodes::ctas_for(tables.num_rows, nodes::kThreadsHere, nodes::kMostOrderingCtas));
    const int64_t stretch = ceil_div(tables.rail_rows, std::max(1, placing));
    nodes::launch(nodes::node_tables_kernel, placing + ordering, nodes::kThreadsHere, stream,
                  nodes::Args{place, tables, placing, static_cast<int32_t>(stretch)});
}

void load_node_kernels(int device) {
    const DeviceGuard guard(device);
    cudaFuncAttributes loaded{};
    EP_CUDA(cudaFuncGetAttributes(&loaded, reinterpret_cast<const void*>(nodes::by_node_kernel)));
    EP_CUDA(
        cudaFuncGetAttributes(&loaded, reinterpret_cast<const void*>(nodes::node_tables_kernel)));
}

}  // namespace ep

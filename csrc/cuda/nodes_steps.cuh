// Where tokens go, node by node.
#pragma once

#include "ep/nodes.h"

namespace ep::nodes {

inline constexpr int kByNodeThreads = 512;

struct ByNodeArgs {
    Place place;
    ByNode by_node;
};

// A thread a token; counts are zero when the kernel starts.
__device__ __forceinline__ void by_node(const ByNodeArgs& a) {
    const Place& p = a.place;
    const ByNode& b = a.by_node;
    const int ranks = p.num_ranks(), lane = static_cast<int>(threadIdx.x & 31);
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kByNodeThreads + threadIdx.x;
    const bool real = token < b.num_tokens;
#pragma unroll 1
    for (int n = 0; n < p.num_nodes; ++n) {
        bool any = false;
        for (int l = 0; l < p.ranks_per_node; ++l) {
            const int r = p.rank_of(n, l);
            const bool goes = real && b.is_token_in_rank[token * ranks + r] != 0;
            any = any || goes;
            if (real && b.named != nullptr) b.named[token * ranks + r] = goes ? r : -1;
        }
        if (real) b.is_token_in_node[token * p.num_nodes + n] = any ? 1 : 0;
        const int count = __popc(__ballot_sync(0xffffffffu, any));
        if (lane == 0 && count > 0) atomicAdd(&b.tokens_per_node[n], count);
    }
}

}  // namespace ep::nodes

// From the integers that cross to the structs of ep/wire.h. Needs neither _C nor NVSHMEM.
#pragma once

#include <cstdint>

#include "ep/wire.h"

namespace ep {

inline wire::Region wire_region(int num_nodes, int ranks_per_node, int rank, int max_experts,
                                int64_t max_tokens, int64_t max_hidden, int max_topk) {
    return wire::Region::make(
        {num_nodes, ranks_per_node, rank / ranks_per_node, rank % ranks_per_node}, max_experts,
        max_tokens, max_hidden, max_topk);
}

inline wire::Message wire_message(uintptr_t per_rank, uintptr_t per_node, uintptr_t per_expert,
                                  int num_experts) {
    return {reinterpret_cast<const int32_t*>(per_rank), reinterpret_cast<const int32_t*>(per_node),
            reinterpret_cast<const int32_t*>(per_expert), num_experts};
}

inline wire::Transfer wire_transfer(bool home, uintptr_t rail_prefix, int64_t row_bytes,
                                    int num_scales, int topk, bool has_idx, bool has_weights,
                                    int64_t block_rows) {
    return {home ? wire::Way::kHome : wire::Way::kOut,
            reinterpret_cast<const int32_t*>(rail_prefix),
            row_bytes,
            num_scales,
            topk,
            has_idx,
            has_weights,
            block_rows};
}

inline wire::Tables wire_tables(uintptr_t rail_prefix, int num_tokens, uintptr_t out_prefix,
                                uintptr_t home_prefix, uintptr_t home_order) {
    return {reinterpret_cast<const int32_t*>(rail_prefix), num_tokens,
            reinterpret_cast<int32_t*>(out_prefix), reinterpret_cast<int32_t*>(home_prefix),
            reinterpret_cast<int32_t*>(home_order)};
}

}  // namespace ep

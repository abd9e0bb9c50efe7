// From the integers that cross to the structs of ep/nodes.h.
#pragma once

#include "bindings.h"
#include "ep/nodes.h"

namespace ep {

inline nodes::Place node_place(int num_nodes, int ranks_per_node, int rank) {
    return {num_nodes, ranks_per_node, rank / ranks_per_node, rank % ranks_per_node};
}

inline nodes::Tables node_tables_of(uintptr_t rank_prefix, uintptr_t rail_prefix, uintptr_t goes,
                                    int32_t rail_rows, int32_t num_rows, uintptr_t node_prefix,
                                    uintptr_t position, uintptr_t reach, uintptr_t target,
                                    uintptr_t order) {
    nodes::Tables t{};
    t.rank_prefix = pointer<const int32_t>(rank_prefix);
    t.rail_prefix = pointer<const int32_t>(rail_prefix);
    t.goes = pointer<const uint8_t>(goes);
    t.rail_rows = rail_rows;
    t.num_rows = num_rows;
    t.node_prefix = pointer<int32_t>(node_prefix);
    t.position = pointer<int32_t>(position);
    t.reach = pointer<int32_t>(reach);
    t.target = pointer<int32_t>(target);
    t.order = pointer<int32_t>(order);
    return t;
}

inline nodes::ByNode by_node_of(uintptr_t is_token_in_rank, int32_t num_tokens,
                                uintptr_t is_token_in_node, uintptr_t tokens_per_node,
                                uintptr_t named) {
    return {pointer<const uint8_t>(is_token_in_rank), num_tokens,
            pointer<uint8_t>(is_token_in_node), pointer<int32_t>(tokens_per_node),
            pointer<int32_t>(named)};
}

}  // namespace ep

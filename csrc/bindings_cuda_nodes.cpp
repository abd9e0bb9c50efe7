// Tables of groups that span nodes, on GPU ranks.
#include "bindings.h"
#include "bindings_nodes.h"
#include "cuda/nodes.h"

namespace ep {
namespace {

using py::literals::operator""_a;

void tables(int num_nodes, int ranks_per_node, int rank, uintptr_t rank_prefix,
            uintptr_t rail_prefix, uintptr_t goes, int32_t rail_rows, int32_t num_rows,
            uintptr_t node_prefix, uintptr_t position, uintptr_t reach, uintptr_t target,
            uintptr_t order, int device, uintptr_t stream) {
    launch_node_tables(node_place(num_nodes, ranks_per_node, rank),
                       node_tables_of(rank_prefix, rail_prefix, goes, rail_rows, num_rows,
                                      node_prefix, position, reach, target, order),
                       device, stream);
}

}  // namespace

void bind_cuda_nodes(py::module_& m) {
    m.def("load_node_kernels", &load_node_kernels, NoGil(), "device"_a);
    m.def(
        "cuda_by_node",
        [](int num_nodes, int ranks_per_node, int rank, uintptr_t is_token_in_rank,
           int32_t num_tokens, uintptr_t is_token_in_node, uintptr_t tokens_per_node,
           uintptr_t named, int device, uintptr_t stream) {
            launch_by_node(
                node_place(num_nodes, ranks_per_node, rank),
                by_node_of(is_token_in_rank, num_tokens, is_token_in_node, tokens_per_node, named),
                device, stream);
        },
        NoGil(), "num_nodes"_a, "ranks_per_node"_a, "rank"_a, "is_token_in_rank"_a, "num_tokens"_a,
        "is_token_in_node"_a, "tokens_per_node"_a, "named"_a, "device"_a, "stream"_a);
    m.def("cuda_node_tables", &tables, NoGil(), "num_nodes"_a, "ranks_per_node"_a, "rank"_a,
          "rank_prefix"_a, "rail_prefix"_a, "goes"_a, "rail_rows"_a, "num_rows"_a, "node_prefix"_a,
          "position"_a, "reach"_a, "target"_a, "order"_a, "device"_a, "stream"_a);
}

}  // namespace ep

// A GPU rank's tables of its node, as the bindings see them.
#pragma once

#include "cuda/cuda_rank.h"
#include "ep/nodes.h"

namespace ep {

// Each launches one kernel (by_node a memset too) on `stream` of `device`; capturable. They throw
// std::invalid_argument.
void launch_by_node(const nodes::Place& place, const nodes::ByNode& by_node, int device,
                    StreamHandle stream);
void launch_node_tables(const nodes::Place& place, const nodes::Tables& tables, int device,
                        StreamHandle stream);

// So that no launch has to load a kernel while another rank waits.
void load_node_kernels(int device);

}  // namespace ep

// A CPU rank's tables of its node.
#pragma once

#include "ep/nodes.h"

namespace ep::host {

void by_node(const nodes::Place& place, const nodes::ByNode& b);
void node_tables(const nodes::Place& place, const nodes::Tables& tables);

}  // namespace ep::host

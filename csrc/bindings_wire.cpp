// Puts between nodes, of CPU ranks, and where what is put lies.
#include "bindings_wire.h"
#include "bindings.h"
#include "host/wire.h"

namespace ep {
namespace {

using host::HostWire;
using host::NormalRank;
using py::literals::operator""_a;

py::dict region_dict(int num_nodes, int ranks_per_node, int max_experts, int64_t max_tokens,
                     int64_t max_hidden, int max_topk) {
    const auto r =
        wire_region(num_nodes, ranks_per_node, 0, max_experts, max_tokens, max_hidden, max_topk);
    py::dict d;
    d["bytes"] = r.bytes();
    d["data"] = r.data;
    d["inbox"] = r.inbox;
    d["mirrors"] = r.mirrors;
    d["partial"] = r.partial;
    d["partial_weights"] = r.partial_weights;
    d["data_bytes"] = r.data_bytes;
    d["counters"] = sizeof(wire::Counters);
    return d;
}

}  // namespace

void bind_wire(py::module_& m) {
    m.def("wire_region", &region_dict, "num_nodes"_a, "ranks_per_node"_a, "max_experts"_a,
          "max_tokens"_a, "max_hidden"_a, "max_topk"_a);
    py::class_<HostWire>(m, "HostWire")
        .def(py::init([](NormalRank& whole, NormalRank& rail, int num_nodes, int ranks_per_node,
                         int rank, int max_experts, int64_t max_tokens, int64_t max_hidden,
                         int max_topk, const std::vector<uintptr_t>& regions, uintptr_t counters) {
                 return std::make_unique<HostWire>(
                     whole, rail,
                     wire_region(num_nodes, ranks_per_node, rank, max_experts, max_tokens,
                                 max_hidden, max_topk),
                     regions, counters);
             }),
             "whole"_a, "rail"_a, "num_nodes"_a, "ranks_per_node"_a, "rank"_a, "max_experts"_a,
             "max_tokens"_a, "max_hidden"_a, "max_topk"_a, "regions"_a, "counters"_a,
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def(
            "announce",
            [](HostWire& wire, uintptr_t per_rank, uintptr_t per_node, uintptr_t per_expert,
               int num_experts) {
                wire.announce(wire_message(per_rank, per_node, per_expert, num_experts));
            },
            NoGil(), "per_rank"_a, "per_node"_a, "per_expert"_a, "num_experts"_a)
        .def("await_messages", &HostWire::await_messages, NoGil(), "num_experts"_a)
        .def(
            "tables",
            [](HostWire& wire, uintptr_t rail_prefix, int num_tokens, uintptr_t out_prefix,
               uintptr_t home_prefix, uintptr_t home_order) {
                wire.tables(
                    wire_tables(rail_prefix, num_tokens, out_prefix, home_prefix, home_order));
            },
            NoGil(), "rail_prefix"_a, "num_tokens"_a, "out_prefix"_a, "home_prefix"_a,
            "home_order"_a)
        .def(
            "put",
            [](HostWire& wire, bool home, uintptr_t rail_prefix, int64_t row_bytes, int num_scales,
               int topk, bool has_idx, bool has_weights, int64_t block_rows, int num_sms) {
                (void)num_sms;  // a CPU rank is one thread
                wire.put(wire_transfer(home, rail_prefix, row_bytes, num_scales, topk, has_idx,
                                       has_weights, block_rows));
            },
            NoGil(), "home"_a, "rail_prefix"_a, "row_bytes"_a, "num_scales"_a, "topk"_a,
            "has_idx"_a, "has_weights"_a, "block_rows"_a, "num_sms"_a)
        .def(
            "await_rows",
            [](HostWire& wire, bool home) {
                wire.await_rows(home ? wire::Way::kHome : wire::Way::kOut);
            },
            NoGil(), "home"_a)
        .def("reset", &HostWire::reset, NoGil());
}

}  // namespace ep

// Puts between nodes, of GPU ranks that map each other's memory; and the waits of all.
#include "bindings.h"
#include "bindings_wire.h"
#include "cuda/wire.h"

namespace ep {

using py::literals::operator""_a;

void bind_cuda_wire(py::module_& m) {
    using Address = std::uintptr_t;
    py::class_<CudaWire>(m, "CudaWire")
        .def(py::init([](const CudaNormal& whole, const CudaNormal& rail, int num_nodes,
                         int ranks_per_node, int rank, int max_experts, int64_t max_tokens,
                         int64_t max_hidden, int max_topk, const std::vector<Address>& regions,
                         Address counters, int device) {
                 return std::make_unique<CudaWire>(
                     whole, rail,
                     wire_region(num_nodes, ranks_per_node, rank, max_experts, max_tokens,
                                 max_hidden, max_topk),
                     regions, counters, device);
             }),
             "whole"_a, "rail"_a, "num_nodes"_a, "ranks_per_node"_a, "rank"_a, "max_experts"_a,
             "max_tokens"_a, "max_hidden"_a, "max_topk"_a, "regions"_a, "counters"_a, "device"_a,
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def_property_readonly("mine", &CudaWire::mine)
        .def_property_readonly("counters", &CudaWire::counters)
        .def_property_readonly("abort_word", &CudaWire::abort_word)
        .def(
            "announce",
            [](const CudaWire& wire, Address per_rank, Address per_node, Address per_expert,
               int num_experts, Address stream) {
                wire.announce(wire_message(per_rank, per_node, per_expert, num_experts), stream);
            },
            NoGil(), "per_rank"_a, "per_node"_a, "per_expert"_a, "num_experts"_a, "stream"_a)
        .def("await_messages", &CudaWire::await_messages, NoGil(), "num_experts"_a, "stream"_a)
        .def(
            "tables",
            [](const CudaWire& wire, Address rail_prefix, int num_tokens, Address out_prefix,
               Address home_prefix, Address home_order, Address stream) {
                wire.tables(
                    wire_tables(rail_prefix, num_tokens, out_prefix, home_prefix, home_order),
                    stream);
            },
            NoGil(), "rail_prefix"_a, "num_tokens"_a, "out_prefix"_a, "home_prefix"_a,
            "home_order"_a, "stream"_a)
        .def(
            "put",
            [](const CudaWire& wire, bool home, Address rail_prefix, int64_t row_bytes,
               int num_scales, int topk, bool has_idx, bool has_weights, int64_t block_rows,
               int num_sms, Address stream) {
                wire.put(wire_transfer(home, rail_prefix, row_bytes, num_scales, topk, has_idx,
                                       has_weights, block_rows),
                         num_sms, stream);
            },
            NoGil(), "home"_a, "rail_prefix"_a, "row_bytes"_a, "num_scales"_a, "topk"_a,
            "has_idx"_a, "has_weights"_a, "block_rows"_a, "num_sms"_a, "stream"_a)
        .def(
            "await_rows",
            [](const CudaWire& wire, bool home, Address stream) {
                wire.await_rows(home ? wire::Way::kHome : wire::Way::kOut, stream);
            },
            NoGil(), "home"_a, "stream"_a)
        .def("reset", &CudaWire::reset, NoGil());
}

}  // namespace ep

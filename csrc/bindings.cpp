// The native module: shapes, layout, faults, CPU ranks and their memory.
#include "bindings.h"

#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "host/faults.h"
#include "host/host_rank.h"
#include "host/memory.h"

#if !defined(EP_WITH_CUDA)
#define EP_WITH_CUDA 0
#endif
#if !defined(EP_CUDA_ARCHS)
#define EP_CUDA_ARCHS ""
#endif
#if !defined(EP_BUILD_INFO)
#define EP_BUILD_INFO "unknown"
#endif

namespace ep {
namespace {

using host::HostMemory;
using host::HostRank;
using host::ShmSegment;
using py::literals::operator""_a;

// std::system_error -> OSError (FileExistsError, PermissionError, ... by errno).
void translate_system_error(std::exception_ptr pending) {
    try {
        if (pending) std::rethrow_exception(pending);
    } catch (const std::system_error& error) {
        const py::object arguments = py::make_tuple(error.code().value(), error.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
}

Shape make_shape(int32_t num_ranks, int32_t num_experts, int32_t topk, int32_t hidden,
                 int32_t max_tokens, int32_t num_chains, int32_t wire, int32_t opaque_row_bytes,
                 int32_t opaque_scales, int32_t combine_wire) {
    const Shape shape{num_ranks,
                      num_experts,
                      topk,
                      hidden,
                      max_tokens,
                      num_chains,
                      static_cast<Wire>(wire),
                      opaque_row_bytes,
                      opaque_scales,
                      static_cast<Wire>(combine_wire)};
    if (const char* reason = invalid_reason(shape)) throw std::invalid_argument(reason);
    return shape;
}

py::dict limits() {
    py::dict d;
    d["max_ranks"] = kMaxRanks;
    d["max_topk"] = kMaxTopk;
    d["max_hidden"] = kMaxHidden;
    d["max_experts"] = kMaxExperts;
    d["max_chains"] = kMaxChains;
    d["max_tokens"] = kMaxTokens;
    d["hidden_multiple"] = kScaleGroup;
    return d;
}

py::dict layout(const Shape& shape) {
    const HeapLayout heap = HeapLayout::make(shape);
    const LocalLayout local = LocalLayout::make(shape);
    py::dict d;
    d["heap_bytes"] = heap.bytes;
    d["local_bytes"] = local.bytes;
    const MessageLayout message = MessageLayout::make(shape, shape.wire);
    d["routing_bytes"] = RoutingLayout::make(shape).bytes;
    d["message_bytes"] = message.bytes;
    d["message_lines"] = message.lines;
    d["message_stride"] = heap.message_stride;
    d["dispatch_offset"] = heap.dispatch_slot(shape, 0, 0, 0, 0);  // chain 0, even epochs
    d["dispatch_half"] = static_cast<int64_t>(shape.max_messages()) * heap.message_stride;
    d["combine_stride"] = heap.combine_stride;
    d["combine_bytes"] = SumLayout::make(shape, shape.combine).bytes;
    d["counts_stride"] = heap.counts.stride;
    d["stats_offset"] = local.chain(0) + local.stats_offset;  // chain c: + c * stats_stride
    d["stats_stride"] = local.chain_bytes;
    d["stats_bytes"] = sizeof(StepStats);
    return d;
}

FaultBoard* board_at(uintptr_t address) {
    if (address == 0) throw std::invalid_argument("the address of a fault board is null");
    return pointer<FaultBoard>(address);
}

void bind_constants(py::module_& m) {
    m.attr("has_cuda") = py::bool_(EP_WITH_CUDA != 0);
    m.attr("cuda_archs") = EP_WITH_CUDA ? EP_CUDA_ARCHS : "";
    m.attr("build_info") = EP_BUILD_INFO;
    const auto add = [&m](const char* name, auto value) {
        m.attr(name) = static_cast<int64_t>(value);
    };
    add("FAULT_NONE", FaultCode::kNone);
    add("FAULT_TIMEOUT", FaultCode::kTimeout);
    add("FAULT_ABORTED", FaultCode::kAborted);
    add("FAULT_DESYNC", FaultCode::kDesync);
    add("FAULT_COUNT", FaultCode::kCount);
    add("FAULT_ROUTING", FaultCode::kRouting);
    add("FAULT_TERMS", FaultCode::kTerms);
    add("OP_DISPATCH", Op::kDispatch);
    add("OP_COMBINE", Op::kCombine);
    add("OP_NORMAL_NOTIFY", Op::kNormalNotify);
    add("OP_NORMAL_DISPATCH", Op::kNormalDispatch);
    add("OP_NORMAL_COMBINE", Op::kNormalCombine);
    add("WIRE_BF16", Wire::kBf16);
    add("WIRE_FP8", Wire::kFp8);
    add("WIRE_OPAQUE", Wire::kOpaque);
    add("RECV_BATCHED", Format::kBatched);
    add("RECV_CONTIGUOUS", Format::kContiguous);
    add("RECV_COMPACT", Format::kCompact);
}

void bind_shape(py::module_& m) {
    py::class_<Shape>(m, "Shape")
        .def(py::init(&make_shape), py::kw_only(), "num_ranks"_a, "num_experts"_a, "topk"_a,
             "hidden"_a, "max_tokens"_a, "num_chains"_a, "wire"_a, "opaque_row_bytes"_a = 0,
             "opaque_scales"_a = 0, "combine_wire"_a = static_cast<int32_t>(Wire::kBf16));
    m.def("limits", &limits);
    m.def("layout", &layout, "shape"_a);
    bind_tensors(m);
}

void bind_faults(py::module_& m) {
    py::class_<Fault>(m, "Fault")
        .def_readonly("code", &Fault::code)
        .def_readonly("op", &Fault::op)
        .def_readonly("chain", &Fault::chain)
        .def_readonly("rank", &Fault::rank)
        .def_readonly("peer", &Fault::peer)
        .def_readonly("count", &Fault::count)
        .def_readonly("expected", &Fault::expected)
        .def_readonly("seen", &Fault::seen);
    m.def("fault_bytes", [] { return sizeof(FaultBoard); });
    m.def(
        "read_fault", [](uintptr_t a) { return host::read_fault(board_at(a)->fatal); },
        "address"_a);
    m.def(
        "read_routing_fault", [](uintptr_t a) { return host::read_fault(board_at(a)->routing); },
        "address"_a);
    m.def("clear_faults", [](uintptr_t a) { host::clear_faults(board_at(a)); }, "address"_a);
}

void bind_host_rank(py::module_& m) {
    py::class_<HostRank>(m, "HostRank")
        .def(py::init<const Shape&, int, const std::vector<uintptr_t>&, uintptr_t, uintptr_t>(),
             "shape"_a, "rank"_a, "heaps"_a, "local"_a, "fault"_a)
        .def("dispatch_send", &HostRank::dispatch_send, NoGil(), "chain"_a, "input"_a)
        .def("dispatch_recv", &HostRank::dispatch_recv, NoGil(), "chain"_a, "target"_a)
        .def("combine_send", &HostRank::combine_send, NoGil(), "chain"_a, "input"_a)
        .def("combine_recv", &HostRank::combine_recv, NoGil(), "chain"_a, "output"_a)
        .def("set_time_budget", &HostRank::set_time_budget, "nanoseconds"_a)
        .def("set_rank_mask", &HostRank::set_rank_mask, "rank"_a, "masked"_a)
        .def("clear_rank_mask", &HostRank::clear_rank_mask)
        .def("read_rank_mask",
             [](const HostRank& rank) { return masked_ranks(rank.read_rank_mask()); })
        .def(
            "read_stats",
            [](const HostRank& rank, int chain) { return stats_dict(rank.read_stats(chain)); },
            "chain"_a)
        .def(
            "read_state",
            [](const HostRank& rank, int chain) {
                const ChainState state = rank.read_state(chain);
                return py::make_tuple(state.dispatched, state.combined);
            },
            "chain"_a)
        .def("reset", &HostRank::reset, NoGil());
}

void bind_host_memory(py::module_& m) {
    py::class_<HostMemory>(m, "HostMemory")
        .def(py::init<int64_t>(), "num_bytes"_a)
        .def_property_readonly("address", &HostMemory::address)
        .def("close", &HostMemory::close);
    py::class_<ShmSegment>(m, "ShmSegment")
        .def(py::init<const std::string&, int64_t, bool>(), "name"_a, "num_bytes"_a, "create"_a)
        .def_property_readonly("address", &ShmSegment::address)
        .def("unlink", &ShmSegment::unlink)
        .def("close", &ShmSegment::close);
}

}  // namespace
}  // namespace ep

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native core: addresses and stream handles are plain integers.";
    pybind11::register_exception_translator(&ep::translate_system_error);
    ep::bind_constants(m);
    ep::bind_shape(m);
    ep::bind_faults(m);
    ep::bind_host_rank(m);
    ep::bind_host_memory(m);
    ep::bind_normal(m);
    ep::bind_nodes(m);
    ep::bind_wire(m);
#if EP_WITH_CUDA
    ep::bind_cuda(m);
#endif
}

// The CUDA half of ep_runtime._C (stub: ep_runtime/_C.pyi).
#include "bindings.h"

#include "cuda/cuda_rank.h"
#include "cuda/error.h"
#include "cuda/memory.h"

namespace ep {
namespace {

using Address = std::uintptr_t;

void bind_rank(py::module_& m) {
    py::class_<CudaRank>(m, "CudaRank")
        .def(py::init([](const Shape& shape, int rank, const std::vector<Address>& heaps,
                         Address local, Address fault, int device, int num_sms, bool pdl) {
                 return std::make_unique<CudaRank>(shape, rank, heaps, local, fault,
                                                   CudaRank::Options{device, num_sms, pdl});
             }),
             py::arg("shape"), py::arg("rank"), py::arg("heaps"), py::arg("local"),
             py::arg("fault"), py::arg("device"), py::arg("num_sms"), py::arg("pdl"))
        .def("dispatch_send", &CudaRank::dispatch_send, py::arg("chain"), py::arg("input"),
             py::arg("stream"), NoGil())
        .def("dispatch_recv", &CudaRank::dispatch_recv, py::arg("chain"), py::arg("target"),
             py::arg("expected_tokens"), py::arg("stream"), NoGil())
        .def("dispatch_fused", &CudaRank::dispatch_fused, py::arg("chain"), py::arg("input"),
             py::arg("target"), py::arg("expected_tokens"), py::arg("stream"), NoGil())
        .def("combine_send", &CudaRank::combine_send, py::arg("chain"), py::arg("input"),
             py::arg("expected_tokens"), py::arg("stream"), NoGil())
        .def("combine_recv", &CudaRank::combine_recv, py::arg("chain"), py::arg("output"),
             py::arg("stream"), NoGil())
        .def("combine_fused", &CudaRank::combine_fused, py::arg("chain"), py::arg("input"),
             py::arg("output"), py::arg("expected_tokens"), py::arg("stream"), NoGil())
        .def("set_time_budget", &CudaRank::set_time_budget, py::arg("nanoseconds"), NoGil())
        .def("set_rank_mask", &CudaRank::set_rank_mask, py::arg("rank"), py::arg("masked"),
             py::arg("stream"), NoGil())
        .def("clear_rank_mask", &CudaRank::clear_rank_mask, py::arg("stream"), NoGil())
        .def("write_rank_mask", &CudaRank::write_rank_mask, py::arg("address"), py::arg("stream"),
             NoGil())
        .def("read_rank_mask",
             [](const CudaRank& rank) { return masked_ranks(rank.read_rank_mask()); })
        .def("read_stats",
             [](const CudaRank& rank, int chain) { return stats_dict(rank.read_stats(chain)); })
        .def("read_state",
             [](const CudaRank& rank, int chain) {
                 const ChainState s = rank.read_state(chain);
                 return py::make_tuple(s.dispatched, s.combined);
             })
        .def("reset", &CudaRank::reset, NoGil());
}

// The driver frees memory when the device is idle: other threads must be able to run until then,
// for one of them may be the peer that a kernel on the device waits for.
template <class Memory>
struct FreedWithoutGil {
    void operator()(Memory* memory) const {
        const py::gil_scoped_release unlocked;
        delete memory;
    }
};

template <class Memory>
using MemoryClass = py::class_<Memory, std::unique_ptr<Memory, FreedWithoutGil<Memory>>>;

template <class Memory>
MemoryClass<Memory> bind_memory(py::module_& m, const char* name) {
    MemoryClass<Memory> bound(m, name);
    bound.def_property_readonly("address", &Memory::address).def("close", &Memory::close, NoGil());
    return bound;
}

}  // namespace

void bind_cuda(py::module_& m) {
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const CudaFailure& e) {
            const py::object type = py::module_::import("ep_runtime.errors").attr("CudaError");
            PyErr_SetString(type.ptr(), e.what());
        }
    });
    bind_rank(m);
    bind_cuda_normal(m);
    bind_cuda_nodes(m);
    bind_cuda_wire(m);
    bind_memory<DeviceMemory>(m, "DeviceMemory")
        .def(py::init<int64_t, int>(), py::arg("num_bytes"), py::arg("device"), NoGil())
        .def("ipc_handle",
             [](const DeviceMemory& memory) { return py::bytes(memory.ipc_handle()); });
    bind_memory<IpcMapping>(m, "IpcMapping")
        .def(py::init([](const py::bytes& handle, int device) {
                 const std::string raw(handle);
                 const py::gil_scoped_release unlocked;
                 return new IpcMapping(raw, device);
             }),
             py::arg("handle"), py::arg("device"));
    bind_memory<PinnedMemory>(m, "PinnedMemory")
        .def(py::init<int64_t>(), py::arg("num_bytes"), NoGil());
    m.def("cuda_device_count", &device_count);
    m.def("cuda_device_attributes", &device_attributes, py::arg("device"));
    m.def("can_access_peer", &can_access_peer, py::arg("device"), py::arg("peer"));
    m.def("enable_peer_access", &enable_peer_access, py::arg("device"), py::arg("peer"));
    m.def("cuda_fill_zero", &fill_zero, py::arg("address"), py::arg("num_bytes"), py::arg("device"),
          NoGil());
}

}  // namespace ep

// What the parts of the native module share. Addresses and stream handles cross as plain integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "ep/heap.h"

namespace ep {

namespace py = pybind11;

// SendInput, RecvTarget, CombineInput, CombineOutput: the tensors of operations.
void bind_tensors(py::module_& module);
// CudaRank and the memory of devices; defined in bindings_cuda.cpp where CUDA is built in.
void bind_cuda(py::module_& module);

// Layouts and CPU ranks of the normal operations.
void bind_normal(py::module_& module);
// Those of GPU ranks, where CUDA is built in.
void bind_cuda_normal(py::module_& module);

// Groups that span nodes.
void bind_nodes(py::module_& module);
void bind_cuda_nodes(py::module_& module);
void bind_wire(py::module_& module);
void bind_cuda_wire(py::module_& module);

// Every operation runs without the GIL.
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline std::vector<int> masked_ranks(const RankMask& mask) {
    std::vector<int> ranks;
    for (int r = 0; r < kMaxRanks; ++r) {
        if (mask.has(r)) ranks.push_back(r);
    }
    return ranks;
}

inline py::dict stats_dict(const StepStats& stats) {
    py::dict d;
    d["messages_sent"] = stats.messages_sent;
    d["messages_received"] = stats.messages_received;
    d["rows_received"] = stats.rows_received;
    d["bytes_dispatched"] = stats.bytes_dispatched;
    d["bytes_combined"] = stats.bytes_combined;
    d["wait_ns"] = std::vector<uint64_t>(stats.wait_ns, stats.wait_ns + kMaxRanks);
    return d;
}

}  // namespace ep

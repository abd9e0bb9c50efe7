// What the parts of the native module share. Addresses and stream handles cross as plain integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "ep/heap.h"

namespace ep {

namespace py = pybind11;

// CudaRank and the memory of devices; defined in bindings_cuda.cpp where CUDA is built in.
void bind_cuda(py::module_& module);

// Every operation runs without the GIL.
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline SendInput make_send_input(uintptr_t x, int64_t x_stride, uintptr_t topk_idx,
                                 int32_t idx_bytes, uintptr_t weights, int32_t num_tokens,
                                 uintptr_t num_tokens_address) {
    return SendInput{pointer<const uint16_t>(x),
                     x_stride,
                     pointer<const void>(topk_idx),
                     idx_bytes,
                     pointer<const float>(weights),
                     num_tokens,
                     pointer<const int32_t>(num_tokens_address)};
}

inline py::dict stats_dict(const StepStats& stats) {
    py::dict d;
    d["messages_sent"] = stats.messages_sent;
    d["messages_received"] = stats.messages_received;
    d["rows_received"] = stats.rows_received;
    d["bytes_dispatched"] = stats.bytes_dispatched;
    d["bytes_combined"] = stats.bytes_combined;
    return d;
}

}  // namespace ep

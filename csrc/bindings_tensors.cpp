// The tensors of operations, as Python describes them: addresses, strides and formats.
//
// `Routing` is built from the address of the handle's memory (layout()["routing_bytes"] bytes).
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace ep {
namespace {

using py::literals::operator""_a;

constexpr int32_t kMaxAlignment = 1 << 16;

Routing make_routing(const Shape& shape, uintptr_t address) {
    if (address == 0 || address % sizeof(RowRef) != 0) {
        throw std::invalid_argument(
            "the routing memory must not be null and must be 8-byte aligned");
    }
    return Routing::at(pointer<uint8_t>(address), shape);
}

SendInput make_send_input(const Shape& shape, uintptr_t routing, int32_t wire, bool round_scale,
                          uintptr_t x, int64_t x_stride, uintptr_t scales, int64_t scale_row_stride,
                          int64_t scale_group_stride, uintptr_t topk_idx, int32_t idx_bytes,
                          uintptr_t weights, int32_t num_tokens, uintptr_t num_tokens_address) {
    return SendInput{.wire = static_cast<Wire>(wire),
                     .round_scale = round_scale,
                     .x = pointer<const uint8_t>(x),
                     .row_stride = x_stride,
                     .scales = pointer<const uint32_t>(scales),
                     .scale_row_stride = scale_row_stride,
                     .scale_group_stride = scale_group_stride,
                     .topk_idx = pointer<const void>(topk_idx),
                     .idx_bytes = idx_bytes,
                     .weights = pointer<const float>(weights),
                     .num_tokens = num_tokens,
                     .num_valid = pointer<const int32_t>(num_tokens_address),
                     .routing = make_routing(shape, routing)};
}

RecvTarget make_target(const Shape& shape, uintptr_t routing, int32_t format, int32_t wire,
                       int32_t alignment, uintptr_t x, int32_t num_rows, uintptr_t scales,
                       bool ue8m0, int32_t scale_expert_stride, int32_t scale_row_stride,
                       int32_t scale_group_stride, uintptr_t recv_count, uintptr_t expert_offset,
                       uintptr_t topk_idx, uintptr_t topk_weights, uintptr_t num_messages,
                       uintptr_t source_token, uintptr_t layout_range, uintptr_t cumulative_count,
                       uintptr_t wait_ns) {
    if (format < static_cast<int32_t>(Format::kBatched) ||
        format > static_cast<int32_t>(Format::kCompact)) {
        throw std::invalid_argument("format " + std::to_string(format) + " is not a RECV_*");
    }
    if (alignment < 1 || alignment > kMaxAlignment) {
        throw std::invalid_argument("alignment " + std::to_string(alignment) + " is not in 1.." +
                                    std::to_string(kMaxAlignment));
    }
    return RecvTarget{.format = static_cast<Format>(format),
                      .wire = static_cast<Wire>(wire),
                      .alignment = alignment,
                      .x = pointer<uint8_t>(x),
                      .num_rows = num_rows,
                      .scales = {pointer<uint32_t>(scales), ue8m0, scale_expert_stride,
                                 scale_row_stride, scale_group_stride},
                      .recv_count = pointer<int32_t>(recv_count),
                      .expert_offset = pointer<int32_t>(expert_offset),
                      .topk_idx = pointer<int32_t>(topk_idx),
                      .topk_weights = pointer<float>(topk_weights),
                      .num_messages = pointer<int32_t>(num_messages),
                      .source_token = pointer<int32_t>(source_token),
                      .layout_range = pointer<int64_t>(layout_range),
                      .cumulative_count = pointer<int32_t>(cumulative_count),
                      .wait_ns = pointer<int64_t>(wait_ns),
                      .routing = make_routing(shape, routing)};
}

CombineInput make_combine_input(const Shape& shape, uintptr_t routing, int32_t wire, uintptr_t y,
                                int64_t y_stride, bool late_weights, uintptr_t weights,
                                int32_t num_tokens) {
    return CombineInput{.wire = static_cast<Wire>(wire),
                        .y = pointer<const uint16_t>(y),
                        .row_stride = y_stride,
                        .late_weights = late_weights,
                        .weights = pointer<const float>(weights),
                        .num_tokens = num_tokens,
                        .routing = make_routing(shape, routing)};
}

CombineOutput make_combine_output(const Shape& shape, uintptr_t routing, int32_t wire,
                                  bool late_weights, uintptr_t out, int32_t num_tokens,
                                  uintptr_t num_tokens_address, uintptr_t wait_ns) {
    return CombineOutput{.wire = static_cast<Wire>(wire),
                         .late_weights = late_weights,
                         .out = pointer<uint16_t>(out),
                         .num_tokens = num_tokens,
                         .num_valid = pointer<const int32_t>(num_tokens_address),
                         .wait_ns = pointer<int64_t>(wait_ns),
                         .routing = make_routing(shape, routing)};
}

}  // namespace

void bind_tensors(py::module_& m) {
    py::class_<SendInput>(m, "SendInput")
        .def(py::init(&make_send_input), "shape"_a, py::kw_only(), "routing"_a, "wire"_a,
             "round_scale"_a = false, "x"_a, "x_stride"_a, "scales"_a = 0, "scale_row_stride"_a = 0,
             "scale_group_stride"_a = 0, "topk_idx"_a, "idx_bytes"_a, "weights"_a, "num_tokens"_a,
             "num_tokens_address"_a = 0);
    py::class_<RecvTarget>(m, "RecvTarget")
        .def(py::init(&make_target), "shape"_a, py::kw_only(), "routing"_a, "format"_a, "wire"_a,
             "alignment"_a = 1, "x"_a, "num_rows"_a, "scales"_a = 0, "ue8m0"_a = false,
             "scale_expert_stride"_a = 0, "scale_row_stride"_a = 0, "scale_group_stride"_a = 0,
             "recv_count"_a, "expert_offset"_a = 0, "topk_idx"_a = 0, "topk_weights"_a = 0,
             "num_messages"_a, "source_token"_a = 0, "layout_range"_a = 0, "cumulative_count"_a = 0,
             "wait_ns"_a = 0);
    py::class_<CombineInput>(m, "CombineInput")
        .def(py::init(&make_combine_input), "shape"_a, py::kw_only(), "routing"_a,
             "wire"_a = static_cast<int32_t>(Wire::kBf16), "y"_a, "y_stride"_a,
             "late_weights"_a = false, "weights"_a = 0, "num_tokens"_a = 0);
    py::class_<CombineOutput>(m, "CombineOutput")
        .def(py::init(&make_combine_output), "shape"_a, py::kw_only(), "routing"_a,
             "wire"_a = static_cast<int32_t>(Wire::kBf16), "late_weights"_a = false, "out"_a,
             "num_tokens"_a, "num_tokens_address"_a = 0, "wait_ns"_a = 0);
}

}  // namespace ep

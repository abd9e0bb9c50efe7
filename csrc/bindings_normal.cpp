// Normal operations: layouts and CPU ranks. The CUDA class has the same methods and a stream.
#include "bindings.h"
#include "ep/normal.h"
#include "host/normal_rank.h"

namespace ep {
namespace {

using host::NormalRank;
using py::literals::operator""_a;

py::dict control_dict(int num_ranks, int max_experts, int64_t start) {
    py::dict d;
    d["control_bytes"] = normal::ControlLayout::make(num_ranks, max_experts, start).bytes;
    d["local_bytes"] = sizeof(normal::State);
    return d;
}

py::dict block_dict(int64_t rows, int64_t row_bytes, int num_scales, int topk) {
    const auto block = normal::BlockLayout::make(rows, row_bytes, num_scales, topk);
    py::dict d;
    d["scales"] = block.scales;
    d["topk_idx"] = block.topk_idx;
    d["topk_weights"] = block.topk_weights;
    d["source_token"] = block.source_token;
    d["x"] = block.x;
    d["bytes"] = block.bytes;
    return d;
}

py::dict inbox_dict(int64_t rows, int64_t hidden, int topk) {
    const auto inbox = normal::InboxLayout::make(rows, hidden, topk);
    py::dict d;
    d["packed"] = inbox.packed;
    d["topk_weights"] = inbox.topk_weights;
    d["bytes"] = inbox.bytes;
    return d;
}

void layout(NormalRank& rank, uintptr_t topk_idx, int32_t idx_bytes, int32_t num_tokens,
            int32_t topk, int32_t num_experts, uintptr_t tokens_per_rank,
            uintptr_t tokens_per_expert, uintptr_t is_token_in_rank) {
    rank.layout(NormalRoutes{pointer<const void>(topk_idx), idx_bytes, nullptr, topk}, num_tokens,
                num_experts,
                {pointer<int32_t>(tokens_per_rank), pointer<int32_t>(tokens_per_expert),
                 pointer<uint8_t>(is_token_in_rank)});
}

void notify(NormalRank& rank, uintptr_t tokens_per_rank, uintptr_t tokens_per_expert,
            uintptr_t is_token_in_rank, int32_t num_tokens, int32_t num_experts, int32_t alignment,
            uintptr_t rank_prefix, uintptr_t send_position, uintptr_t recv_counts,
            uintptr_t host_counts) {
    rank.notify({pointer<int32_t>(tokens_per_rank), pointer<int32_t>(tokens_per_expert),
                 pointer<uint8_t>(is_token_in_rank)},
                num_tokens, num_experts, alignment,
                {pointer<int32_t>(rank_prefix), pointer<int32_t>(send_position)},
                pointer<int32_t>(recv_counts), pointer<int32_t>(host_counts));
}

void dispatch(NormalRank& rank, uintptr_t x, int64_t x_stride_bytes, int64_t row_bytes,
              uintptr_t scales, int64_t scale_stride_token, int64_t scale_stride_group,
              int32_t num_scales, uintptr_t topk_idx, int32_t idx_bytes, uintptr_t topk_weights,
              int32_t topk, int32_t num_experts, uintptr_t send_position, uintptr_t rank_prefix,
              int32_t num_tokens, int64_t block_offset, int64_t block_rows, int32_t size,
              int32_t num_sms, uintptr_t source_token) {
    (void)num_sms;  // a CPU rank is one thread
    const NormalRows rows{pointer<const uint8_t>(x),
                          x_stride_bytes,
                          row_bytes,
                          pointer<const uint32_t>(scales),
                          scale_stride_token,
                          scale_stride_group,
                          num_scales,
                          num_tokens,
                          pointer<const int32_t>(source_token)};
    rank.dispatch(
        rows, {pointer<const void>(topk_idx), idx_bytes, pointer<const float>(topk_weights), topk},
        num_experts, {pointer<int32_t>(rank_prefix), pointer<int32_t>(send_position)}, block_offset,
        block_rows, static_cast<normal::BlockSize>(size));
}

void combine(NormalRank& rank, uintptr_t x, int64_t x_stride_bytes, int32_t hidden,
             uintptr_t topk_weights, int32_t topk, uintptr_t bias0, uintptr_t bias1,
             uintptr_t send_position, uintptr_t rank_prefix, int32_t num_tokens,
             int64_t inbox_offset, uintptr_t out, uintptr_t out_weights, int32_t num_sms,
             uintptr_t order) {
    (void)num_sms;
    const NormalCombine work{pointer<const uint8_t>(x),
                             x_stride_bytes,
                             hidden,
                             pointer<const float>(topk_weights),
                             topk,
                             {pointer<const uint16_t>(bias0), pointer<const uint16_t>(bias1)},
                             num_tokens,
                             inbox_offset,
                             pointer<uint16_t>(out),
                             pointer<float>(out_weights),
                             pointer<const int32_t>(order)};
    rank.combine(work, {pointer<int32_t>(rank_prefix), pointer<int32_t>(send_position)});
}

}  // namespace

void bind_normal(py::module_& m) {
    m.def("normal_layout", &control_dict, "num_ranks"_a, "max_experts"_a,
          "start"_a = normal::kLine);
    py::class_<normal::Part>(m, "NormalPart")
        .def(py::init([](int index, int64_t control_start, int first, int step) {
                 return normal::Part{index, control_start, Names{first, step - 1}};
             }),
             "index"_a, "control_start"_a, "first"_a, "step"_a);
    m.attr("BLOCK_EXACT") = static_cast<int32_t>(normal::BlockSize::kExact);
    m.attr("BLOCK_PADDED") = static_cast<int32_t>(normal::BlockSize::kPadded);
    m.attr("BLOCK_AHEAD") = static_cast<int32_t>(normal::BlockSize::kAhead);
    m.def("normal_block", &block_dict, "rows"_a, "row_bytes"_a, "num_scales"_a, "topk"_a);
    m.def("normal_inbox", &inbox_dict, "rows"_a, "hidden"_a, "topk"_a);
    py::class_<NormalRank>(m, "HostNormal")
        .def(py::init<int, int, int, const std::vector<uintptr_t>&, const std::vector<uintptr_t>&,
                      int64_t, uintptr_t, uintptr_t, const normal::Part&>(),
             "num_ranks"_a, "rank"_a, "max_experts"_a, "control"_a, "data"_a, "data_bytes"_a,
             "local"_a, "fault"_a, "part"_a = normal::Part{})
        .def("layout", &layout, NoGil(), "topk_idx"_a, "idx_bytes"_a, "num_tokens"_a, "topk"_a,
             "num_experts"_a, "tokens_per_rank"_a, "tokens_per_expert"_a, "is_token_in_rank"_a)
        .def("notify", &notify, NoGil(), "tokens_per_rank"_a, "tokens_per_expert"_a,
             "is_token_in_rank"_a, "num_tokens"_a, "num_experts"_a, "alignment"_a, "rank_prefix"_a,
             "send_position"_a, "recv_counts"_a, "host_counts"_a)
        .def("dispatch", &dispatch, NoGil(), "x"_a, "x_stride_bytes"_a, "row_bytes"_a, "scales"_a,
             "scale_stride_token"_a, "scale_stride_group"_a, "num_scales"_a, "topk_idx"_a,
             "idx_bytes"_a, "topk_weights"_a, "topk"_a, "num_experts"_a, "send_position"_a,
             "rank_prefix"_a, "num_tokens"_a, "block_offset"_a, "block_rows"_a, "size"_a,
             "num_sms"_a, "source_token"_a)
        .def("combine", &combine, NoGil(), "x"_a, "x_stride_bytes"_a, "hidden"_a, "topk_weights"_a,
             "topk"_a, "bias0"_a, "bias1"_a, "send_position"_a, "rank_prefix"_a, "num_tokens"_a,
             "inbox_offset"_a, "out"_a, "out_weights"_a, "num_sms"_a, "order"_a)
        .def("set_time_budget", &NormalRank::set_time_budget, "nanoseconds"_a)
        .def("read_state",
             [](const NormalRank& rank) {
                 const normal::State& state = rank.state();
                 return py::make_tuple(state.notified, state.dispatched, state.combined);
             })
        .def("reset", &NormalRank::reset, NoGil());
}

}  // namespace ep

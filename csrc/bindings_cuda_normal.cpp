// CudaNormal of ep_runtime._C: as HostNormal (bindings_normal.cpp), launched on a stream.
#include "bindings.h"
#include "cuda/normal_rank.h"

namespace ep {
namespace {

using Address = std::uintptr_t;
using py::literals::operator""_a;

void layout(const CudaNormal& rank, Address topk_idx, int32_t idx_bytes, int32_t num_tokens,
            int32_t topk, int32_t num_experts, Address tokens_per_rank, Address tokens_per_expert,
            Address is_token_in_rank, Address stream) {
    rank.layout(NormalRoutes{pointer<const void>(topk_idx), idx_bytes, nullptr, topk}, num_tokens,
                num_experts,
                {pointer<int32_t>(tokens_per_rank), pointer<int32_t>(tokens_per_expert),
                 pointer<uint8_t>(is_token_in_rank)},
                stream);
}

void notify(const CudaNormal& rank, Address tokens_per_rank, Address tokens_per_expert,
            Address is_token_in_rank, int32_t num_tokens, int32_t num_experts, int32_t alignment,
            Address rank_prefix, Address send_position, Address recv_counts, Address host_counts,
            Address stream) {
    rank.notify({pointer<int32_t>(tokens_per_rank), pointer<int32_t>(tokens_per_expert),
                 pointer<uint8_t>(is_token_in_rank)},
                num_tokens, num_experts, alignment,
                {pointer<int32_t>(rank_prefix), pointer<int32_t>(send_position)},
                pointer<int32_t>(recv_counts), pointer<int32_t>(host_counts), stream);
}

void dispatch(const CudaNormal& rank, Address x, int64_t x_stride_bytes, int64_t row_bytes,
              Address scales, int64_t scale_stride_token, int64_t scale_stride_group,
              int32_t num_scales, Address topk_idx, int32_t idx_bytes, Address topk_weights,
              int32_t topk, int32_t num_experts, Address send_position, Address rank_prefix,
              int32_t num_tokens, int64_t block_offset, int64_t block_rows, int32_t size,
              int32_t num_sms, Address source_token, Address stream) {
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
        block_rows, static_cast<normal::BlockSize>(size), num_sms, stream);
}

void combine(const CudaNormal& rank, Address x, int64_t x_stride_bytes, int32_t hidden,
             Address topk_weights, int32_t topk, Address bias0, Address bias1,
             Address send_position, Address rank_prefix, int32_t num_tokens, int64_t inbox_offset,
             Address out, Address out_weights, int32_t num_sms, Address order, Address stream) {
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
    rank.combine(work, {pointer<int32_t>(rank_prefix), pointer<int32_t>(send_position)}, num_sms,
                 stream);
}

}  // namespace

void bind_cuda_normal(py::module_& m) {
    py::class_<CudaNormal>(m, "CudaNormal")
        .def(py::init<int, int, int, const std::vector<Address>&, const std::vector<Address>&,
                      int64_t, Address, Address, int, const normal::Part&>(),
             "num_ranks"_a, "rank"_a, "max_experts"_a, "control"_a, "data"_a, "data_bytes"_a,
             "local"_a, "fault"_a, "device"_a, "part"_a = normal::Part{})
        .def("layout", &layout, NoGil(), "topk_idx"_a, "idx_bytes"_a, "num_tokens"_a, "topk"_a,
             "num_experts"_a, "tokens_per_rank"_a, "tokens_per_expert"_a, "is_token_in_rank"_a,
             "stream"_a)
        .def("notify", &notify, NoGil(), "tokens_per_rank"_a, "tokens_per_expert"_a,
             "is_token_in_rank"_a, "num_tokens"_a, "num_experts"_a, "alignment"_a, "rank_prefix"_a,
             "send_position"_a, "recv_counts"_a, "host_counts"_a, "stream"_a)
        .def("dispatch", &dispatch, NoGil(), "x"_a, "x_stride_bytes"_a, "row_bytes"_a, "scales"_a,
             "scale_stride_token"_a, "scale_stride_group"_a, "num_scales"_a, "topk_idx"_a,
             "idx_bytes"_a, "topk_weights"_a, "topk"_a, "num_experts"_a, "send_position"_a,
             "rank_prefix"_a, "num_tokens"_a, "block_offset"_a, "block_rows"_a, "size"_a,
             "num_sms"_a, "source_token"_a, "stream"_a)
        .def("combine", &combine, NoGil(), "x"_a, "x_stride_bytes"_a, "hidden"_a, "topk_weights"_a,
             "topk"_a, "bias0"_a, "bias1"_a, "send_position"_a, "rank_prefix"_a, "num_tokens"_a,
             "inbox_offset"_a, "out"_a, "out_weights"_a, "num_sms"_a, "order"_a, "stream"_a)
        .def("set_time_budget", &CudaNormal::set_time_budget, "nanoseconds"_a, NoGil())
        .def("read_state",
             [](const CudaNormal& rank) {
                 const normal::State state = rank.read_state();
                 return py::make_tuple(state.notified, state.dispatched, state.combined);
             })
        .def("reset", &CudaNormal::reset, NoGil());
}

}  // namespace ep

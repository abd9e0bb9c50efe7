#include "cuda/cuda_rank.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/kernels.h"

namespace ep {
namespace {

DispatchKernels dispatch_kernels(const Shape& shape) {
    return shape.wire == Wire::kFp8 ? fp8_dispatch_kernels(shape.hidden)
                                    : bf16_dispatch_kernels(shape.hidden);
}

const void* kernel_of(int kernel, const Shape& shape) {
    switch (kernel) {
        case 0:
            return reinterpret_cast<const void*>(dispatch_kernels(shape).send);
        case 1:
            return reinterpret_cast<const void*>(dispatch_recv_kernel_ptr());
        case 2:
            return reinterpret_cast<const void*>(dispatch_kernels(shape).fused);
        case 3:
            return reinterpret_cast<const void*>(combine_kernels().send);
        case 4:
            return reinterpret_cast<const void*>(combine_kernels().recv);
        default:
            return reinterpret_cast<const void*>(combine_kernels().fused);
    }
}

struct Launch {
    int grid;
    int64_t scratch_bytes;
    StreamHandle stream;
    bool pdl;
};

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(how.grid));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(how.scratch_bytes);
    config.stream = reinterpret_cast<cudaStream_t>(how.stream);
    config.attrs = &attribute;
    config.numAttrs = how.pdl ? 1 : 0;
    EP_CUDA(cudaLaunchKernelEx(&config, kernel, args));
}

// At least one CTA, at most those that fit at once.
int grid_for(int64_t items, int resident) {
    return static_cast<int>(std::clamp<int64_t>(items, 1, resident));
}

void check_addresses(const Shape& shape, int rank, const std::vector<std::uintptr_t>& heaps,
                     std::uintptr_t local, std::uintptr_t faults) {
    if (const char* reason = invalid_reason(shape)) throw std::invalid_argument(reason);
    if (rank < 0 || rank >= shape.num_ranks) throw std::invalid_argument("rank out of range");
    if (static_cast<int>(heaps.size()) != shape.num_ranks)
        throw std::invalid_argument("one heap address per rank is needed");
    for (const std::uintptr_t heap : heaps) {
        if (heap == 0 || heap % kLineBytes != 0)
            throw std::invalid_argument("a heap address is null or not 128-byte aligned");
    }
    if (local == 0 || local % 256 != 0 || faults == 0)
        throw std::invalid_argument(
            "local memory must be 256-byte aligned, the fault board not null");
}

}  // namespace

CudaRank::CudaRank(const Shape& shape, int rank, const std::vector<std::uintptr_t>& heaps,
                   std::uintptr_t local, std::uintptr_t faults, const Options& options)
    : options_(options) {
    check_addresses(shape, rank, heaps, local, faults);
    ctx_.set_shape(shape);
    ctx_.rank = rank;
    ctx_.faults = reinterpret_cast<FaultBoard*>(faults);
    ctx_.local = reinterpret_cast<uint8_t*>(local);
    for (int r = 0; r < shape.num_ranks; ++r) ctx_.heap[r] = reinterpret_cast<uint8_t*>(heaps[r]);

    const DeviceGuard guard(options.device);
    for (int c = 0; c < shape.num_chains; ++c) {
        views_.push_back(View::make(ctx_, c));
        views_.back().starts_early = options.pdl;
    }
    const int64_t send = send_scratch_bytes(views_[0]);
    const int64_t recv = recv_scratch_bytes(views_[0]);
    scratch_ = {send, recv, std::max(send, recv), 0, 0, 0};
    int num_sms = 0;
    EP_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, options.device));
    if (options.num_sms > 0) num_sms = std::min(num_sms, options.num_sms);
    for (int k = 0; k < kNumKernels; ++k) {
        int per_sm = 0;
        cudaFuncAttributes
            loaded{};  // asking for it loads the kernel: no lazy load while a peer spins
        EP_CUDA(cudaFuncGetAttributes(&loaded, kernel_of(k, shape)));
        EP_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &per_sm, kernel_of(k, shape), kThreads, static_cast<size_t>(scratch_[k])));
        resident_[k] = std::max(1, per_sm * num_sms);
    }
}

int CudaRank::expected_tokens(int expected) const {
    return expected > 0 ? std::min(expected, ctx_.shape.max_tokens) : ctx_.shape.max_tokens;
}

int CudaRank::combine_parts() const { return views_[0].parts; }

// CTA 0 announces, the others send a stretch of tokens each.
static int stretch_of(int num_tokens, int grid) {
    return static_cast<int>(std::max<int64_t>(1, ceil_div(num_tokens, grid - 1)));
}

const View& CudaRank::view(int chain) const {
    if (chain < 0 || chain >= ctx_.shape.num_chains) throw std::invalid_argument("no such chain");
    return views_[static_cast<size_t>(chain)];
}

void CudaRank::dispatch_send(int chain, const SendInput& in, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int grid = 1 + grid_for(in.num_tokens, resident_[kDispatchSend] - 1);
    launch(dispatch_kernels(ctx_.shape).send, {grid, scratch_[kDispatchSend], stream, options_.pdl},
           DispatchSendArgs{
               .in = in, .stretch = stretch_of(in.num_tokens, grid), .view = view(chain)});
}

void CudaRank::dispatch_recv(int chain, const RecvTarget& target, int expected,
                             StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t messages = static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected);
    const int grid = grid_for(messages, resident_[kDispatchRecv]);
    launch(dispatch_recv_kernel_ptr(), {grid, scratch_[kDispatchRecv], stream, options_.pdl},
           DispatchRecvArgs{.target = target, .view = view(chain)});
}

void CudaRank::dispatch_fused(int chain, const SendInput& in, const RecvTarget& target,
                              int expected, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t messages = static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected);
    const int64_t wanted =
        std::max<int64_t>({2, messages, 1 + static_cast<int64_t>(in.num_tokens)});
    const int grid = grid_for(wanted, resident_[kDispatchFused]);
    if (grid < 2) throw CudaFailure("dispatch_fused needs two resident CTAs; allow more SMs");
    launch(dispatch_kernels(ctx_.shape).fused,
           {grid, scratch_[kDispatchFused], stream, options_.pdl},
           DispatchFusedArgs{.in = in,
                             .stretch = stretch_of(in.num_tokens, grid),
                             .target = target,
                             .view = view(chain)});
}

void CudaRank::combine_send(int chain, const uint16_t* y, int64_t row_stride, int expected,
                            StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t items =
        static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected) * combine_parts();
    const int grid = grid_for(items, resident_[kCombineSend]);
    launch(combine_kernels().send, {grid, scratch_[kCombineSend], stream, options_.pdl},
           CombineSendArgs{.in = {y, row_stride}, .view = view(chain)});
}

void CudaRank::combine_recv(int chain, uint16_t* out, int num_tokens, const int32_t* num_valid,
                            StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t items = static_cast<int64_t>(num_tokens) * combine_parts();
    const int grid = grid_for(items, resident_[kCombineRecv]);
    launch(combine_kernels().recv, {grid, scratch_[kCombineRecv], stream, options_.pdl},
           CombineRecvArgs{.out = {out, num_tokens, num_valid}, .view = view(chain)});
}

void CudaRank::combine_fused(int chain, const uint16_t* y, int64_t row_stride, uint16_t* out,
                             int num_tokens, const int32_t* num_valid, int expected,
                             StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t others = std::max(1, ctx_.shape.num_ranks - 1);
    const int64_t rows = std::max<int64_t>(num_tokens, others * expected_tokens(expected));
    const int grid = grid_for(rows * combine_parts(), resident_[kCombineFused]);
    launch(combine_kernels().fused, {grid, scratch_[kCombineFused], stream, options_.pdl},
           CombineFusedArgs{
               .in = {y, row_stride}, .out = {out, num_tokens, num_valid}, .view = view(chain)});
}

void CudaRank::set_time_budget(uint64_t nanoseconds) const {
    const DeviceGuard guard(options_.device);
    EP_CUDA(cudaMemcpy(ctx_.local + LocalLayout::kBudgetOffset, &nanoseconds, sizeof(nanoseconds),
                       cudaMemcpyHostToDevice));
}

StepStats CudaRank::read_stats(int chain) const {
    const DeviceGuard guard(options_.device);
    StepStats stats{};
    EP_CUDA(cudaDeviceSynchronize());
    EP_CUDA(cudaMemcpy(&stats, ctx_.stats(chain), sizeof(stats), cudaMemcpyDeviceToHost));
    return stats;
}

ChainState CudaRank::read_state(int chain) const {
    const DeviceGuard guard(options_.device);
    ChainState state{};
    EP_CUDA(cudaDeviceSynchronize());
    EP_CUDA(cudaMemcpy(&state, ctx_.state(chain), sizeof(state), cudaMemcpyDeviceToHost));
    return state;
}

void CudaRank::reset() const {
    const DeviceGuard guard(options_.device);
    EP_CUDA(cudaDeviceSynchronize());
    EP_CUDA(cudaMemset(ctx_.heap[ctx_.rank], 0, static_cast<size_t>(ctx_.layout.bytes)));
    EP_CUDA(cudaMemset(ctx_.local + LocalLayout::kClaimOffset, 0,
                       static_cast<size_t>(ctx_.local_layout.bytes - LocalLayout::kClaimOffset)));
    EP_CUDA(cudaDeviceSynchronize());
}

}  // namespace ep

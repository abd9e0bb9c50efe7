#include "cuda/cuda_rank.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/kernels.cuh"

namespace ep {
namespace {

constexpr int kInFlight = 2;  // ranks whose rows a combine waits for at once

struct KernelInfo {
    const char* name;
    const void* function;
};

const KernelInfo kKernels[] = {
    {"dispatch_send", reinterpret_cast<const void*>(&dispatch_send_kernel)},
    {"dispatch_recv", reinterpret_cast<const void*>(&dispatch_recv_kernel)},
    {"dispatch_fused", reinterpret_cast<const void*>(&dispatch_fused_kernel)},
    {"combine_send", reinterpret_cast<const void*>(&combine_send_kernel)},
    {"combine_recv", reinterpret_cast<const void*>(&combine_recv_kernel<kInFlight>)},
    {"combine_fused", reinterpret_cast<const void*>(&combine_fused_kernel<kInFlight>)},
};

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
    const int64_t send = SendScratch::bytes(ctx_);
    const int64_t recv = RecvScratch::bytes(ctx_);
    scratch_ = {send, recv, std::max(send, recv), 0, 0, 0};
    int num_sms = 0;
    EP_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, options.device));
    if (options.num_sms > 0) num_sms = std::min(num_sms, options.num_sms);
    for (int k = 0; k < kNumKernels; ++k) {
        int per_sm = 0;
        cudaFuncAttributes
            loaded{};  // asking for it loads the kernel: no lazy load while a peer spins
        EP_CUDA(cudaFuncGetAttributes(&loaded, kKernels[k].function));
        EP_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &per_sm, kKernels[k].function, kThreads, static_cast<size_t>(scratch_[k])));
        resident_[k] = std::max(1, per_sm * num_sms);
    }
}

int CudaRank::expected_tokens(int expected) const {
    return expected > 0 ? std::min(expected, ctx_.shape.max_tokens) : ctx_.shape.max_tokens;
}

int CudaRank::combine_parts() const { return RowParts::make(ctx_, kThreads).parts; }

void CudaRank::dispatch_send(int chain, const SendInput& in, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int grid = 1 + std::min(in.num_tokens, std::max(1, resident_[kDispatchSend] - 1));
    launch(dispatch_send_kernel, {grid, scratch_[kDispatchSend], stream, options_.pdl},
           DispatchSendArgs{.chain = chain, .in = in, .ctx = ctx_});
}

void CudaRank::dispatch_recv(int chain, const RecvTarget& target, int expected,
                             StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t messages = static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected);
    const int grid = grid_for(messages, resident_[kDispatchRecv]);
    launch(dispatch_recv_kernel, {grid, scratch_[kDispatchRecv], stream, options_.pdl},
           DispatchRecvArgs{.chain = chain, .target = target, .ctx = ctx_});
}

void CudaRank::dispatch_fused(int chain, const SendInput& in, const RecvTarget& target,
                              int expected, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t messages = static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected);
    const int64_t wanted =
        std::max<int64_t>({2, messages, 1 + static_cast<int64_t>(in.num_tokens)});
    const int grid = grid_for(wanted, resident_[kDispatchFused]);
    if (grid < 2) throw CudaFailure("dispatch_fused needs two resident CTAs; allow more SMs");
    launch(dispatch_fused_kernel, {grid, scratch_[kDispatchFused], stream, options_.pdl},
           DispatchFusedArgs{.chain = chain, .in = in, .target = target, .ctx = ctx_});
}

void CudaRank::combine_send(int chain, const uint16_t* y, int64_t row_stride, int expected,
                            StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t items =
        static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected) * combine_parts();
    const int grid = grid_for(items, resident_[kCombineSend]);
    launch(combine_send_kernel, {grid, scratch_[kCombineSend], stream, options_.pdl},
           CombineSendArgs{.chain = chain,
                           .in = {y, row_stride},
                           .parts = RowParts::make(ctx_, kThreads),
                           .ctx = ctx_});
}

void CudaRank::combine_recv(int chain, uint16_t* out, int num_tokens, const int32_t* num_valid,
                            StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t items = static_cast<int64_t>(num_tokens) * combine_parts();
    const int grid = grid_for(items, resident_[kCombineRecv]);
    launch(combine_recv_kernel<kInFlight>, {grid, scratch_[kCombineRecv], stream, options_.pdl},
           CombineRecvArgs{.chain = chain,
                           .out = {out, num_tokens, num_valid},
                           .parts = RowParts::make(ctx_, kThreads),
                           .ctx = ctx_});
}

void CudaRank::combine_fused(int chain, const uint16_t* y, int64_t row_stride, uint16_t* out,
                             int num_tokens, const int32_t* num_valid, int expected,
                             StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t tokens = std::max<int64_t>(
        num_tokens, static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected));
    const int grid = grid_for(tokens * combine_parts(), resident_[kCombineFused]);
    launch(combine_fused_kernel<kInFlight>, {grid, scratch_[kCombineFused], stream, options_.pdl},
           CombineFusedArgs{.chain = chain,
                            .in = {y, row_stride},
                            .out = {out, num_tokens, num_valid},
                            .parts = RowParts::make(ctx_, kThreads),
                            .ctx = ctx_});
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

std::map<std::string, int> CudaRank::resident_ctas() const {
    std::map<std::string, int> out;
    for (int k = 0; k < kNumKernels; ++k) out[kKernels[k].name] = resident_[k];
    return out;
}

}  // namespace ep

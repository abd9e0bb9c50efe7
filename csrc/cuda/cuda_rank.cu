#include "cuda/cuda_rank.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/kernels.h"

namespace ep {
namespace {

DispatchKernels dispatch_kernels(const View& view, Wire wire) {
    return wire == Wire::kFp8 ? fp8_dispatch_kernels(view.input_vectors)
                              : plain_dispatch_kernels(view.input_vectors);
}

template <class Args>
const void* address(void (*kernel)(Args)) {
    return reinterpret_cast<const void*>(kernel);
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
    int num_sms = 0;
    EP_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, options.device));
    if (options.num_sms > 0) num_sms = std::min(num_sms, options.num_sms);
    for (int w = 0; w < kNumWires; ++w) {
        if (shape.allows(static_cast<Wire>(w))) prepare(static_cast<Wire>(w), num_sms);
    }
}

// Views and launch limits of one wire format; loads its kernels: no lazy load while a peer spins.
void CudaRank::prepare(Wire wire, int num_sms) {
    const auto w = static_cast<size_t>(wire);
    std::vector<View>& views = views_[w];
    for (int c = 0; c < ctx_.shape.num_chains; ++c) {
        views.push_back(View::make(ctx_, c, wire));
        views.back().starts_early = options_.pdl;
    }
    const int64_t send = send_scratch_bytes(views[0]);
    const int64_t recv = recv_scratch_bytes(views[0]);
    const DispatchKernels dispatch = dispatch_kernels(views[0], wire);
    const CombineKernels known = combine_kernels(ctx_.shape.num_ranks, false);
    const CombineKernels late = combine_kernels(ctx_.shape.num_ranks, true);
    const auto load = [&](Kernel k, const void* kernel, int64_t scratch) {
        int per_sm = 0;
        cudaFuncAttributes loaded{};
        EP_CUDA(cudaFuncGetAttributes(&loaded, kernel));
        EP_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads,
                                                              static_cast<size_t>(scratch)));
        room_[w][k] = {std::max(1, per_sm * num_sms), scratch};
    };
    load(kDispatchSend, address(dispatch.send), send);
    load(kDispatchRecv, address(dispatch_recv_kernel_ptr()), recv);
    load(kDispatchFused, address(dispatch.fused), std::max(send, recv));
    load(kCombineSend, address(known.send), 0);
    load(kCombineRecv, address(known.recv), 0);
    load(kCombineFused, address(known.fused), 0);
    load(kCombineOnce, address(known.once), 0);
    load(kLateSend, address(late.send), 0);
    load(kLateFused, address(late.fused), 0);
    load(kLateOnce, address(late.once), 0);
}

int CudaRank::expected_tokens(int expected) const {
    return expected > 0 ? std::min(expected, ctx_.shape.max_tokens) : ctx_.shape.max_tokens;
}

int CudaRank::combine_parts() const { return view(0, ctx_.shape.wire).parts; }

// CTA 0 announces, the others send a stretch of tokens each.
static int stretch_of(int num_tokens, int grid) {
    return static_cast<int>(std::max<int64_t>(1, ceil_div(num_tokens, grid - 1)));
}

const View& CudaRank::view(int chain, Wire wire) const {
    if (chain < 0 || chain >= ctx_.shape.num_chains) throw std::invalid_argument("no such chain");
    const auto w = static_cast<size_t>(wire);
    if (w >= views_.size() || views_[w].empty()) {
        throw std::invalid_argument("a wire format that the shape has no room for");
    }
    return views_[w][static_cast<size_t>(chain)];
}

const CudaRank::Room& CudaRank::room(Kernel kernel, Wire wire) const {
    return room_[static_cast<size_t>(wire)][kernel];
}

void CudaRank::dispatch_send(int chain, const SendInput& in, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const View& v = view(chain, in.wire);
    const Room& r = room(kDispatchSend, in.wire);
    const int grid = 1 + grid_for(in.num_tokens, r.resident - 1);
    launch(dispatch_kernels(v, in.wire).send, {grid, r.scratch, stream, options_.pdl},
           DispatchSendArgs{.in = in, .stretch = stretch_of(in.num_tokens, grid), .view = v});
}

void CudaRank::dispatch_recv(int chain, const RecvTarget& target, int expected,
                             StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t messages = static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected);
    const View& v = view(chain, target.wire);
    const Room& r = room(kDispatchRecv, target.wire);
    // CTA 0 keeps the books.
    const int grid = 1 + grid_for(messages, r.resident - 1);
    launch(dispatch_recv_kernel_ptr(), {grid, r.scratch, stream, options_.pdl},
           DispatchRecvArgs{.target = target, .view = v});
}

void CudaRank::dispatch_fused(int chain, const SendInput& in, const RecvTarget& target,
                              int expected, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    if (in.wire != target.wire) throw std::invalid_argument("a dispatch has one wire format");
    const int64_t messages = static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected);
    const int64_t wanted =
        std::max<int64_t>({2, 1 + messages, 1 + static_cast<int64_t>(in.num_tokens)});
    const View& v = view(chain, in.wire);
    const Room& r = room(kDispatchFused, in.wire);
    const int grid = grid_for(wanted, r.resident);
    if (grid < 2) throw CudaFailure("dispatch_fused needs two resident CTAs; allow more SMs");
    launch(dispatch_kernels(v, in.wire).fused, {grid, r.scratch, stream, options_.pdl},
           DispatchFusedArgs{
               .in = in, .stretch = stretch_of(in.num_tokens, grid), .target = target, .view = v});
}

void CudaRank::combine_send(int chain, const CombineInput& in, int expected,
                            StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t items =
        static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected) * combine_parts();
    const Wire wire = ctx_.shape.wire;
    const int grid =
        grid_for(items, room(in.late_weights ? kLateSend : kCombineSend, wire).resident);
    launch(combine_kernels(ctx_.shape.num_ranks, in.late_weights).send,
           {grid, 0, stream, options_.pdl}, CombineSendArgs{.in = in, .view = view(chain, wire)});
}

void CudaRank::combine_recv(int chain, const CombineOutput& out, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t items = static_cast<int64_t>(out.num_tokens) * combine_parts();
    const Wire wire = ctx_.shape.wire;
    const int grid = grid_for(items, room(kCombineRecv, wire).resident);
    launch(combine_kernels(ctx_.shape.num_ranks, false).recv, {grid, 0, stream, options_.pdl},
           CombineRecvArgs{.out = out, .view = view(chain, wire)});
}

void CudaRank::combine_fused(int chain, const CombineInput& in, const CombineOutput& out,
                             int expected, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t others = std::max(1, ctx_.shape.num_ranks - 1);
    const int64_t rows = std::max<int64_t>(out.num_tokens, others * expected_tokens(expected));
    const int64_t items = rows * combine_parts();
    const Wire wire = ctx_.shape.wire;
    const CombineFusedArgs args{.in = in, .out = out, .view = view(chain, wire)};
    const CombineKernels kernels = combine_kernels(ctx_.shape.num_ranks, in.late_weights);
    const int once = room(in.late_weights ? kLateOnce : kCombineOnce, wire).resident;
    const int always = room(in.late_weights ? kLateFused : kCombineFused, wire).resident;
    if (items <= once) {
        launch(kernels.once, {grid_for(items, once), 0, stream, options_.pdl}, args);
    } else {
        launch(kernels.fused, {grid_for(items, always), 0, stream, options_.pdl}, args);
    }
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

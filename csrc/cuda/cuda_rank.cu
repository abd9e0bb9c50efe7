#include "cuda/cuda_rank.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/grids.h"
#include "cuda/kernels.h"

namespace ep {
namespace {

DispatchKernels dispatch_kernels(const View& view, Wire wire) {
    return wire == Wire::kFp8 ? fp8_dispatch_kernels(view.input_vectors)
                              : plain_dispatch_kernels(view.input_vectors);
}

CombineKernels combine_kernels(Wire wire, bool late_weights, bool few = false) {
    if (few) return few_combine_kernels();
    return wire == Wire::kFp8 ? fp8_combine_kernels(late_weights)
                              : bf16_combine_kernels(late_weights);
}

template <class Args>
const void* address(void (*kernel)(Args)) {
    return reinterpret_cast<const void*>(kernel);
}

struct Launch {
    int grid;
    int threads;
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
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = static_cast<size_t>(how.scratch_bytes);
    config.stream = reinterpret_cast<cudaStream_t>(how.stream);
    config.attrs = &attribute;
    config.numAttrs = how.pdl ? 1 : 0;
    EP_CUDA(cudaLaunchKernelEx(&config, kernel, args));
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
    const DispatchScratch scratch = dispatch_scratch(views[0]);
    const DispatchScratch many = dispatch_many_scratch(views[0]);
    const DispatchKernels dispatch = dispatch_kernels(views[0], wire);
    const RecvKernels receive = dispatch_recv_kernels();
    const auto load = [&](Kernel k, const void* kernel, int64_t scratch) {
        const int threads = k < kCombineSend ? kThreads : kCombineThreads;
        int per_sm = 0;
        cudaFuncAttributes loaded{};
        EP_CUDA(cudaFuncGetAttributes(&loaded, kernel));
        if (loaded.maxDynamicSharedSizeBytes < scratch) {
            EP_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(scratch)));
        }
        EP_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads,
                                                              static_cast<size_t>(scratch)));
        room_[w][k] = {std::max(1, per_sm * num_sms), scratch};
    };
    load(kDispatchSend, address(dispatch.send), scratch.send);
    load(kDispatchRecv, address(receive.recv), scratch.recv);
    load(kDispatchFused, address(dispatch.fused), scratch.send + scratch.recv);
    load(kSendMany, address(dispatch.send_many), many.send);
    load(kRecvMany, address(receive.recv_many), many.recv);
    load(kFusedMany, address(dispatch.fused_many), many.send + many.recv);
    const CombineKernels known = combine_kernels(Wire::kBf16, false);
    const CombineKernels late = combine_kernels(Wire::kBf16, true);
    load(kCombineSend, address(known.send), 0);
    load(kCombineRecv, address(known.recv), 0);
    load(kCombineFused, address(known.fused), 0);
    load(kLateSend, address(late.send), 0);
    load(kLateFused, address(late.fused), 0);
    const CombineKernels fp8 = combine_kernels(Wire::kFp8, false);
    const CombineKernels fp8_late = combine_kernels(Wire::kFp8, true);
    load(kFp8Send, address(fp8.send), 0);
    load(kFp8Recv, address(fp8.recv), 0);
    load(kFp8Fused, address(fp8.fused), 0);
    load(kFp8LateSend, address(fp8_late.send), 0);
    load(kFp8LateFused, address(fp8_late.fused), 0);
    const CombineKernels few = combine_kernels(Wire::kBf16, false, true);
    load(kFewSend, address(few.send), 0);
    load(kFewRecv, address(few.recv), 0);
    load(kFewFused, address(few.fused), 0);
}

void CudaRank::require_combine(Wire wire) const {
    if (ctx_.shape.allows_combine(wire)) return;
    throw std::invalid_argument("a combine format that the shape has no room for");
}

int CudaRank::expected_tokens(int expected) const {
    return expected > 0 ? std::min(expected, ctx_.shape.max_tokens) : ctx_.shape.max_tokens;
}

const View& CudaRank::view(int chain, Wire wire) const {
    if (chain < 0 || chain >= ctx_.shape.num_chains) throw std::invalid_argument("no such chain");
    const auto w = static_cast<size_t>(wire);
    if (w >= views_.size() || views_[w].empty()) {
        throw std::invalid_argument("a wire format that the shape has no room for");
    }
    return views_[w][static_cast<size_t>(chain)];
}

void CudaRank::require_room(const Room& room, int least, const char* what) {
    if (room.resident >= least) return;
    throw CudaFailure(std::string(what) + " needs " + std::to_string(least) +
                      " resident CTAs, there is room for " + std::to_string(room.resident) +
                      "; allow more SMs");
}

const CudaRank::Room& CudaRank::room(Kernel kernel, Wire wire) const {
    return room_[static_cast<size_t>(wire)][kernel];
}

bool CudaRank::takes_few(Kernel few, Wire sums, bool late_weights, int64_t units) const {
    const int resident = room(few, ctx_.shape.wire).resident;
    return sums == Wire::kBf16 && !late_weights && are_few(units, resident);
}

void CudaRank::dispatch_send(int chain, const SendInput& in, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const View& v = view(chain, in.wire);
    const DispatchKernels kernels = dispatch_kernels(v, in.wire);
    const Room& sms = room(kSendMany, in.wire);
    const bool many = are_many(in.num_tokens, kManyTokens, sms.resident);
    const Room& r = many ? sms : room(kDispatchSend, in.wire);
    const int grid = 1 + at_most(in.num_tokens, r.resident - 1);
    launch(many ? kernels.send_many : kernels.send,
           {grid, kThreads, r.scratch, stream, options_.pdl},
           DispatchSendArgs{.in = in, .stretch = stretch_of(in.num_tokens, grid - 1), .view = v});
}

void CudaRank::dispatch_recv(int chain, const RecvTarget& target, int expected,
                             StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    const int64_t messages = int64_t{ctx_.shape.num_ranks} * expected_tokens(expected);
    const View& v = view(chain, target.wire);
    const RecvKernels kernels = dispatch_recv_kernels();
    const Room& sms = room(kRecvMany, target.wire);
    const bool many = are_many(messages, kManyMessages, sms.resident);
    const Room& r = many ? sms : room(kDispatchRecv, target.wire);
    // CTA 0 keeps the books.
    const int bits = many ? 0 : part_bits(v, messages, sms.resident);
    const int grid = 1 + at_most(messages << bits, r.resident - 1);
    launch(many ? kernels.recv_many : kernels.recv,
           {grid, kThreads, r.scratch, stream, options_.pdl},
           DispatchRecvArgs{.target = target, .part_bits = bits, .view = v});
}

void CudaRank::dispatch_fused(int chain, const SendInput& in, const RecvTarget& target,
                              int expected, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    if (in.wire != target.wire) throw std::invalid_argument("a dispatch has one wire format");
    const int64_t messages = int64_t{ctx_.shape.num_ranks} * expected_tokens(expected);
    const View& v = view(chain, in.wire);
    const DispatchKernels kernels = dispatch_kernels(v, in.wire);
    const Room& sms = room(kFusedMany, in.wire);
    const bool many = are_many(messages, kManyMessages, sms.resident);
    const Room& r = many ? sms : room(kDispatchFused, in.wire);
    require_room(r, 2, "dispatch_fused");
    const int bits = many ? 0 : part_bits(v, messages, sms.resident);
    const int64_t parts = messages << bits;
    // Where there is room, those that receive have nothing to send.
    const bool spare = !many && parts + in.num_tokens < sms.resident;
    const int64_t wanted =
        1 + (spare ? parts + in.num_tokens : std::max<int64_t>({1, parts, in.num_tokens}));
    const int grid = at_most(wanted, r.resident);
    const bool apart = are_many(messages, kMessagesToPart, sms.resident);
    const int senders = apart ? (grid - 1) / 2 : grid - 1;
    launch(many ? kernels.fused_many : kernels.fused,
           {grid, kThreads, r.scratch, stream, options_.pdl},
           DispatchFusedArgs{.in = in,
                             .stretch = stretch_of(in.num_tokens, senders),
                             .first_receiver = apart ? 1 + senders : 1,
                             .part_bits = bits,
                             .target = target,
                             .view = v});
}

void CudaRank::combine_send(int chain, const CombineInput& in, int expected,
                            StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    require_combine(in.wire);
    const Wire wire = ctx_.shape.wire;
    const View& v = view(chain, wire);
    const int64_t messages = static_cast<int64_t>(ctx_.shape.num_ranks) * expected_tokens(expected);
    const int64_t units = messages * v.sums;
    const bool few = takes_few(kFewSend, in.wire, in.late_weights, units);
    const Kernel kernel = few                     ? kFewSend
                          : in.wire == Wire::kFp8 ? (in.late_weights ? kFp8LateSend : kFp8Send)
                                                  : (in.late_weights ? kLateSend : kCombineSend);
    const Room& r = room(kernel, wire);
    const int grid = 1 + at_most(ctas_for(few ? 2 * units : units), r.resident - 1);
    launch(combine_kernels(in.wire, in.late_weights, few).send,
           {grid, kCombineThreads, 0, stream, options_.pdl}, CombineSendArgs{.in = in, .view = v});
}

void CudaRank::combine_recv(int chain, const CombineOutput& out, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    require_combine(out.wire);
    const Wire wire = ctx_.shape.wire;
    const View& v = view(chain, wire);
    const int64_t units = int64_t{out.num_tokens} * v.sums;
    const bool few = takes_few(kFewRecv, out.wire, false, units);
    const Room& r = room(few ? kFewRecv : out.wire == Wire::kFp8 ? kFp8Recv : kCombineRecv, wire);
    const int grid = 1 + at_most(ctas_for(few ? 2 * units : units), r.resident - 1);
    launch(combine_kernels(out.wire, false, few).recv,
           {grid, kCombineThreads, 0, stream, options_.pdl},
           CombineRecvArgs{.out = out, .view = v});
}

void CudaRank::combine_fused(int chain, const CombineInput& in, const CombineOutput& out,
                             int expected, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    require_combine(in.wire);
    if (in.wire != out.wire) throw std::invalid_argument("a combine has one format");
    const Wire wire = ctx_.shape.wire;
    const View& v = view(chain, wire);
    const int64_t sent = int64_t{ctx_.shape.num_ranks - 1} * expected_tokens(expected) * v.sums;
    const int64_t received = int64_t{out.num_tokens} * v.sums;
    const bool few = takes_few(kFewFused, in.wire, in.late_weights, sent + received);
    const Kernel kernel = few                     ? kFewFused
                          : in.wire == Wire::kFp8 ? (in.late_weights ? kFp8LateFused : kFp8Fused)
                                                  : (in.late_weights ? kLateFused : kCombineFused);
    const Room& r = room(kernel, wire);
    require_room(r, 3, "combine_fused");
    const int warps = few ? 2 : 1;  // to a unit
    const Split split = Split::of(ctas_for(warps * sent), ctas_for(warps * received),
                                  r.resident - 1, ctx_.shape.num_ranks);
    launch(combine_kernels(in.wire, in.late_weights, few).fused,
           {1 + split.send + split.recv, kCombineThreads, 0, stream, options_.pdl},
           CombineFusedArgs{.in = in, .send_ctas = split.send, .out = out, .view = v});
}

}  // namespace ep

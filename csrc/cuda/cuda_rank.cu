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
    EP_CUDA(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, options.device));
    EP_CUDA(cudaDeviceGetAttribute(&most_shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   options.device));
    EP_CUDA(cudaDeviceGetAttribute(&l2_bytes_, cudaDevAttrL2CacheSize, options.device));
    if (options.num_sms > 0) num_sms_ = std::min(num_sms_, options.num_sms);
    for (int w = 0; w < kNumWires; ++w) {
        if (shape.allows(static_cast<Wire>(w))) prepare(static_cast<Wire>(w));
    }
    prepare_combines();
}

// Loads a kernel, so that none is loaded while a peer spins, and says how much of it fits.
CudaRank::Room CudaRank::load(const void* kernel, int threads, int64_t scratch) const {
    int per_sm = 0;
    cudaFuncAttributes loaded{};
    EP_CUDA(cudaFuncGetAttributes(&loaded, kernel));
    if (loaded.maxDynamicSharedSizeBytes < scratch) {
        EP_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(scratch)));
    }
    EP_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads,
                                                          static_cast<size_t>(scratch)));
    return {std::max(1, per_sm * num_sms_), scratch};
}

CombineKernels CudaRank::combine_kernels(CombineKind kind) {
    switch (kind) {
        case kFewSums:
        case kLateFewSums:
            return few_combine_kernels(kind == kLateFewSums);
        case kStreamedSums:
            return streamed_combine_kernels();
        case kFp8Sums:
        case kLateFp8Sums:
            return fp8_combine_kernels(kind == kLateFp8Sums);
        default:
            return bf16_combine_kernels(kind == kLateSums);
    }
}

void CudaRank::prepare_combines() {
    for (int k = 0; k < kNumCombineKinds; ++k) {
        const CombineKernels kernels = combine_kernels(static_cast<CombineKind>(k));
        combine_room_[k][kSend] = load(address(kernels.send), kCombineThreads, 0);
        combine_room_[k][kRecv] = load(address(kernels.recv), kCombineThreads, 0);
        combine_room_[k][kBoth] = load(address(kernels.fused), kCombineThreads, 0);
    }
}

// Views and launch limits of dispatches of one wire format.
void CudaRank::prepare(Wire wire) {
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
    const auto load_as = [&](Kernel k, const void* kernel, int64_t bytes) {
        room_[w][k] = load(kernel, kThreads, bytes);
    };
    load_as(kDispatchSend, address(dispatch.send), scratch.send);
    load_as(kDispatchRecv, address(receive.recv), scratch.recv);
    load_as(kDispatchFused, address(dispatch.fused), scratch.send + scratch.recv);
    // A GPU with little shared memory does without these.
    const auto load_if_fits = [&](Kernel k, const void* kernel, int64_t bytes) {
        if (bytes <= most_shared_) load_as(k, kernel, bytes);
    };
    load_if_fits(kSendMany, address(dispatch.send_many), many.send);
    load_if_fits(kRecvMany, address(receive.recv_many), many.recv);
    load_if_fits(kFusedMany, address(dispatch.fused_many), many.send + many.recv);
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

CudaRank::CombineKind CudaRank::combine_kind(Half half, Wire sums, bool late_weights, int64_t units,
                                             int tokens) const {
    if (sums == Wire::kFp8) return late_weights ? kLateFp8Sums : kFp8Sums;
    const CombineKind few = late_weights ? kLateFewSums : kFewSums;
    if (are_few(units, combine_room_[few][half].resident)) return few;
    if (late_weights) return kLateSums;
    const int64_t rows = int64_t{tokens} * ctx_.shape.topk;
    return are_streamed(2 * rows * ctx_.shape.hidden, l2_bytes_) ? kStreamedSums : kSums;
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
    const View& v = view(chain, ctx_.shape.wire);
    const int tokens = expected_tokens(expected);
    const int64_t units = int64_t{ctx_.shape.num_ranks} * tokens * v.sums;
    const CombineKind kind = combine_kind(kSend, in.wire, in.late_weights, units, tokens);
    const int ctas =
        at_most(ctas_for(warps_to_a_unit(kind) * units), combine_room_[kind][kSend].resident - 1);
    launch(combine_kernels(kind).send, {1 + ctas, kCombineThreads, 0, stream, options_.pdl},
           CombineSendArgs{.in = in, .view = v});
}

void CudaRank::combine_recv(int chain, const CombineOutput& out, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    require_combine(out.wire);
    const View& v = view(chain, ctx_.shape.wire);
    const int64_t units = int64_t{out.num_tokens} * v.sums;
    const CombineKind kind = combine_kind(kRecv, out.wire, false, units, 0);  // has no rows to add
    const int ctas =
        at_most(ctas_for(warps_to_a_unit(kind) * units), combine_room_[kind][kRecv].resident - 1);
    launch(combine_kernels(kind).recv, {1 + ctas, kCombineThreads, 0, stream, options_.pdl},
           CombineRecvArgs{.out = out, .view = v});
}

void CudaRank::combine_fused(int chain, const CombineInput& in, const CombineOutput& out,
                             int expected, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    require_combine(in.wire);
    if (in.wire != out.wire) throw std::invalid_argument("a combine has one format");
    const View& v = view(chain, ctx_.shape.wire);
    const int ranks = ctx_.shape.num_ranks, tokens = expected_tokens(expected);
    const int64_t sent = int64_t{ranks - 1} * tokens * v.sums;
    const int64_t received = int64_t{out.num_tokens} * v.sums;
    const CombineKind kind = combine_kind(kBoth, in.wire, in.late_weights, sent + received, tokens);
    const Room& r = combine_room_[kind][kBoth];
    require_room(r, 3, "combine_fused");
    const int warps = warps_to_a_unit(kind);
    const Split split =
        Split::of(ctas_for(warps * sent), ctas_for(warps * received), r.resident - 1, ranks);
    launch(combine_kernels(kind).fused,
           {1 + split.send + split.recv, kCombineThreads, 0, stream, options_.pdl},
           CombineFusedArgs{.in = in, .send_ctas = split.send, .out = out, .view = v});
}

}  // namespace ep

// Pairs of dispatch and combine on two GPUs of one process, without Python: for work on the
// kernels.
//
//   nvcc -std=c++20 -O3 -arch=sm_90 -Icsrc benchmarks/native/pair_loop.cu csrc/cuda/*.cu -o
//   build/pair_loop build/pair_loop
//
// One host thread per GPU; 50 pairs in one graph, the slower GPU's median of 20 replays. BF16 lines
// check themselves (the experts are the identity, so combine must give x times the sum of the
// weights); FP8 lines are only timed. Figures to publish come from `ep-runtime bench low-latency`.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cuda/cuda_rank.h"
#include "cuda/error.h"
#include "cuda/memory.h"
#include "ep/fp8.h"

namespace {

using namespace ep;

constexpr int kGpus = 2;
constexpr int kPairs = 50;
constexpr int kReplays = 20;
constexpr int kWarmups = 2;
constexpr int kHidden = 7168;
constexpr int kTopk = 8;
constexpr uint64_t kBudgetNs = 3'000'000'000;

struct Case {
    const char* name;
    int num_tokens;
    int num_experts;
    Wire wire;
    Format format;
    bool fused;
    bool pdl;
};

// Lets both GPUs start together: each waits, boundedly, for the other's number.
__global__ void meet_kernel(volatile int* mine, volatile const int* other, int number) {
    *mine = number;
    __threadfence_system();
    const long long start = clock64();
    while (*other < number && clock64() - start < 2'000'000'000) {
    }
}

template <class T>
class Array {
  public:
    explicit Array(size_t n, int device) : memory_(static_cast<int64_t>(n * sizeof(T)), device) {}
    Array(const std::vector<T>& values, int device) : Array(values.size(), device) {
        EP_CUDA(
            cudaMemcpy(data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    T* data() const { return reinterpret_cast<T*>(memory_.address()); }

  private:
    DeviceMemory memory_;
};

// What the two threads share for one case.
struct Shared {
    Shape shape;
    DeviceMemory heaps[kGpus], locals[kGpus], numbers[kGpus];
    PinnedMemory faults[kGpus];
    std::barrier<> meet{kGpus};
    std::vector<float> times[kGpus];
    double error[kGpus] = {};

    explicit Shared(const Shape& s)
        : shape(s),
          heaps{{HeapLayout::make(s).bytes, 0}, {HeapLayout::make(s).bytes, 1}},
          locals{{LocalLayout::make(s).bytes, 0}, {LocalLayout::make(s).bytes, 1}},
          numbers{{4, 0}, {4, 1}},
          faults{PinnedMemory(4096), PinnedMemory(4096)} {}
};

struct Tensors {
    std::vector<uint16_t> x;
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;

    Tensors(const Case& c, int gpu) {
        std::mt19937 random(static_cast<unsigned>(77 * gpu + c.num_tokens));
        std::normal_distribution<float> normal;
        x.resize(static_cast<size_t>(c.num_tokens) * kHidden);
        for (uint16_t& v : x) v = float_to_bf16(normal(random));
        std::vector<int64_t> experts(c.num_experts);
        std::iota(experts.begin(), experts.end(), 0);
        for (int t = 0; t < c.num_tokens; ++t) {
            std::shuffle(experts.begin(), experts.end(), random);
            topk_idx.insert(topk_idx.end(), experts.begin(), experts.begin() + kTopk);
            for (int k = 0; k < kTopk; ++k) weights.push_back(0.1f * static_cast<float>(k + 1));
        }
    }
};

double largest_error(const std::vector<uint16_t>& x, const uint16_t* device_out) {
    std::vector<uint16_t> out(x.size());
    EP_CUDA(cudaMemcpy(out.data(), device_out, 2 * out.size(), cudaMemcpyDeviceToHost));
    const double sum = 0.1 * kTopk * (kTopk + 1) / 2;
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double right = bf16_to_float(x[i]) * sum;
        const double error = std::abs(bf16_to_float(out[i]) - right) / (std::abs(right) + 1e-2);
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

void run_gpu(int gpu, const Case& c, Shared& shared) {
    EP_CUDA(cudaSetDevice(gpu));
    const Shape& s = shared.shape;
    const CudaRank rank(s, gpu, {shared.heaps[0].address(), shared.heaps[1].address()},
                        shared.locals[gpu].address(), shared.faults[gpu].address(),
                        {gpu, 0, c.pdl});
    rank.set_time_budget(kBudgetNs);
    const int local = s.num_local_experts();
    const bool compact = c.format == Format::kCompact;
    const size_t rows = static_cast<size_t>(s.max_messages()) * (compact ? 1 : local);
    const Tensors host(c, gpu);
    const Array<uint16_t> x(host.x, gpu), out(host.x.size(), gpu), y(rows * kHidden, gpu);
    const Array<int64_t> topk_idx(host.topk_idx, gpu);
    const Array<float> weights(host.weights, gpu), scales(rows * kHidden / kScaleGroup, gpu);
    const Array<uint8_t> received(rows * s.row_bytes(), gpu);
    const Array<int32_t> recv_count(local, gpu), offset(local + 1, gpu), messages(kGpus, gpu);
    const Array<int32_t> choices(static_cast<size_t>(s.max_messages()) * kTopk, gpu);
    const Array<float> choice_weights(static_cast<size_t>(s.max_messages()) * kTopk, gpu);
    // BF16 rows are combined as they came; FP8 ones stand in for any result.
    const uint16_t* result =
        c.wire == Wire::kBf16 ? reinterpret_cast<const uint16_t*>(received.data()) : y.data();
    const SendInput in{x.data(),       kHidden,      topk_idx.data(), 8,
                       weights.data(), c.num_tokens, nullptr};
    const RecvTarget target{c.format,          1,
                            received.data(),   scales.data(),
                            recv_count.data(), offset.data(),
                            choices.data(),    choice_weights.data(),
                            messages.data()};
    cudaStream_t stream;
    EP_CUDA(cudaStreamCreate(&stream));
    const auto handle = reinterpret_cast<StreamHandle>(stream);
    const auto pair = [&] {
        if (c.fused) {
            rank.dispatch_fused(0, in, target, c.num_tokens, handle);
            rank.combine_fused(0, result, kHidden, out.data(), c.num_tokens, nullptr, c.num_tokens,
                               handle);
            return;
        }
        rank.dispatch_send(0, in, handle);
        rank.dispatch_recv(0, target, c.num_tokens, handle);
        rank.combine_send(0, result, kHidden, c.num_tokens, handle);
        rank.combine_recv(0, out.data(), c.num_tokens, nullptr, handle);
    };
    shared.meet.arrive_and_wait();
    pair();
    EP_CUDA(cudaStreamSynchronize(stream));
    const bool checked = c.wire == Wire::kBf16 && !compact;
    shared.error[gpu] = checked ? largest_error(host.x, out.data()) : -1;

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    EP_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kPairs; ++i) pair();
    EP_CUDA(cudaStreamEndCapture(stream, &graph));
    EP_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    EP_CUDA(cudaGraphUpload(exec, stream));
    cudaEvent_t begin, end;
    EP_CUDA(cudaEventCreate(&begin));
    EP_CUDA(cudaEventCreate(&end));
    for (int i = 0; i < kWarmups + kReplays; ++i) {
        shared.meet.arrive_and_wait();
        meet_kernel<<<1, 1, 0, stream>>>(reinterpret_cast<int*>(shared.numbers[gpu].address()),
                                         reinterpret_cast<int*>(shared.numbers[1 - gpu].address()),
                                         i + 1);
        EP_CUDA(cudaEventRecord(begin, stream));
        EP_CUDA(cudaGraphLaunch(exec, stream));
        EP_CUDA(cudaEventRecord(end, stream));
        EP_CUDA(cudaStreamSynchronize(stream));
        float ms = 0;
        EP_CUDA(cudaEventElapsedTime(&ms, begin, end));
        if (i >= kWarmups) shared.times[gpu].push_back(1000 * ms / kPairs);
    }
    EP_CUDA(cudaGraphExecDestroy(exec));
    EP_CUDA(cudaGraphDestroy(graph));
    EP_CUDA(cudaStreamDestroy(stream));
    shared.meet.arrive_and_wait();  // both are done before either's memory goes
}

void measure(const Case& c) {
    Shared shared({kGpus, c.num_experts, kTopk, kHidden, std::max(128, c.num_tokens), 1, c.wire});
    std::thread second([&] { run_gpu(1, c, shared); });
    run_gpu(0, c, shared);
    second.join();
    std::vector<float> slower;
    for (int i = 0; i < kReplays; ++i) {
        slower.push_back(std::max(shared.times[0][i], shared.times[1][i]));
    }
    std::sort(slower.begin(), slower.end());
    std::printf("%-16s T=%4d E=%3d %s pdl=%d: median %.2f us (%.2f-%.2f)", c.name, c.num_tokens,
                c.num_experts, c.fused ? "fused" : "split", c.pdl, slower[kReplays / 2],
                slower.front(), slower.back());
    if (shared.error[0] >= 0) {
        std::printf("  largest error %.2g", std::max(shared.error[0], shared.error[1]));
    }
    for (int gpu = 0; gpu < kGpus; ++gpu) {
        const Fault& fault = reinterpret_cast<FaultBoard*>(shared.faults[gpu].address())->fatal;
        if (fault.code != 0)
            std::printf("  FAULT %u on GPU %d, peer %d", fault.code, gpu, fault.peer);
    }
    std::puts("");
    std::fflush(stdout);
}

}  // namespace

int main() {
    if (device_count() < kGpus) {
        std::fprintf(stderr, "two GPUs are needed, %d here\n", device_count());
        return 1;
    }
    enable_peer_access(0, 1);
    enable_peer_access(1, 0);
    for (const bool fused : {false, true}) {
        for (const int t : {1, 8, 128}) {
            measure({"bf16 batched", t, 256, Wire::kBf16, Format::kBatched, fused, true});
        }
    }
    for (const bool fused : {false, true}) {
        for (const int t : {1, 8, 32, 64, 128}) {
            measure({"fp8 batched", t, 256, Wire::kFp8, Format::kBatched, fused, true});
        }
    }
    for (const int t : {1, 8, 32, 64, 128, 512, 1024}) {
        measure({"fp8 compact", t, 256, Wire::kFp8, Format::kCompact, true, true});
    }
    for (const int t : {512, 1024}) {
        measure({"fp8 contiguous", t, 256, Wire::kFp8, Format::kContiguous, true, true});
    }
}

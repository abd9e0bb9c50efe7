// Pairs of dispatch and combine between ranks of one process, without Python: for work on the
// kernels.
//
//   nvcc -std=c++20 -O3 -arch=sm_90 -Icsrc -o build/pair_loop benchmarks/native/pair_loop.cu
//       csrc/cuda/*.cu   (all on one line)
//   build/pair_loop [--ranks R] [--one-gpu] [--sms N] [--fused] [--parts] [--tokens T] [--late]
//
// R ranks (2), each on a GPU of its own. With fewer GPUs, or with --one-gpu, all ranks share GPU 0,
// each on a stream of its own with N SMs' worth of CTAs: no link is measured then, and only runs of
// this kind on the same GPU may be compared. Elsewhere N limits the SMs too; 0 is all. --fused
// leaves the split kernels out. --parts measures FP8 pairs, dispatches alone and combines alone at
// every size, and nothing else; T then chooses one size. --late: weights come with the combine, as
// DeepEP's do (not where rows are compact). (One rank alone can be profiled by tools that stop at
// every kernel.)
//
// One host thread per rank; 50 pairs in one graph, the slowest rank's median of 20 replays. BF16
// lines check themselves (the experts are the identity, so combine must give x times the sum of the
// weights); FP8 lines are only timed. Exit status 1 if a line was wrong or recorded a fault.
// Figures to publish come from `ep-runtime bench low-latency`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/cuda_rank.h"
#include "ep/fp8.h"
#include "replays.cuh"

namespace {

using namespace ep;

constexpr int kPairs = 50;
constexpr int kReplays = 20;
constexpr int kHidden = 7168;
constexpr int kTopk = 8;
constexpr uint64_t kBudgetNs = 3'000'000'000;
constexpr bool kPdl = true;
constexpr double kErrorLimit = 1e-2;  // two BF16 roundings are 0.4e-2 at most

// Where the ranks are.
struct Place {
    int ranks;
    std::vector<int> device;
    int num_sms;  // that a rank's kernels may fill; 0: all
};

// What a graph repeats; the halves alone are not checked.
enum class What { kPair, kDispatch, kCombine };

struct Case {
    const char* name;
    int num_tokens;
    int num_experts;
    Wire wire;
    Format format;
    bool fused;
    bool pdl;
    What what = What::kPair;
    bool late = false;
};

// What the threads share for one case.
struct Shared {
    Shape shape;
    std::deque<DeviceMemory> heaps, locals;
    std::deque<PinnedMemory> faults;
    StartLine line;
    std::vector<std::vector<float>> times;
    std::vector<double> error;

    Shared(const Shape& s, const Place& place)
        : shape(s), line(place.device), times(place.ranks), error(place.ranks) {
        for (int r = 0; r < place.ranks; ++r) {
            heaps.emplace_back(HeapLayout::make(s).bytes, place.device[r]);
            locals.emplace_back(LocalLayout::make(s).bytes, place.device[r]);
            faults.emplace_back(4096);
        }
    }
    std::vector<std::uintptr_t> heap_addresses() const {
        std::vector<std::uintptr_t> all;
        for (const DeviceMemory& heap : heaps) all.push_back(heap.address());
        return all;
    }
};

struct Tensors {
    std::vector<uint16_t> x;
    std::vector<int64_t> topk_idx;
    std::vector<float> weights;

    Tensors(const Case& c, int rank) {
        std::mt19937 random(static_cast<unsigned>(77 * rank + c.num_tokens));
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
        if (!std::isfinite(error)) return HUGE_VAL;
        worst = std::max(worst, error);
    }
    return worst;
}

void run_rank(int me, const Case& c, const Place& place, Shared& shared) {
    const int gpu = place.device[me];
    EP_CUDA(cudaSetDevice(gpu));
    const Shape& s = shared.shape;
    const CudaRank rank(s, me, shared.heap_addresses(), shared.locals[me].address(),
                        shared.faults[me].address(), {gpu, place.num_sms, c.pdl});
    rank.set_time_budget(kBudgetNs);
    const int local = s.num_local_experts();
    const bool compact = c.format == Format::kCompact;
    const size_t rows = static_cast<size_t>(s.max_messages()) * (compact ? 1 : local);
    const Tensors host(c, me);
    const Array<uint16_t> x(host.x, gpu), out(host.x.size(), gpu), y(rows * kHidden, gpu);
    const Array<int64_t> topk_idx(host.topk_idx, gpu);
    const Array<float> weights(host.weights, gpu), scales(rows * kHidden / kScaleGroup, gpu);
    const Array<uint8_t> received(rows * s.row_bytes(c.wire), gpu);
    const Array<uint8_t> routing_memory(RoutingLayout::make(s).bytes, gpu);
    const Routing routing = Routing::at(routing_memory.data(), s);
    const Array<int32_t> recv_count(local, gpu), offset(local + 1, gpu), messages(place.ranks, gpu);
    const Array<int32_t> choices(static_cast<size_t>(s.max_messages()) * kTopk, gpu);
    const Array<float> choice_weights(static_cast<size_t>(s.max_messages()) * kTopk, gpu);
    // BF16 rows are combined as they came; FP8 ones stand in for any result.
    const uint16_t* result =
        c.wire == Wire::kBf16 ? reinterpret_cast<const uint16_t*>(received.data()) : y.data();
    const SendInput in{.wire = c.wire,
                       .x = reinterpret_cast<const uint8_t*>(x.data()),
                       .row_stride = 2 * kHidden,
                       .topk_idx = topk_idx.data(),
                       .idx_bytes = 8,
                       .weights = c.late ? nullptr : weights.data(),
                       .num_tokens = c.num_tokens,
                       .routing = routing};
    constexpr int kGroups = kHidden / kScaleGroup;
    const RecvTarget target{.format = c.format,
                            .wire = c.wire,
                            .alignment = 1,
                            .x = received.data(),
                            .num_rows = static_cast<int32_t>(rows),
                            .scales = {reinterpret_cast<uint32_t*>(scales.data()), false,
                                       s.max_messages() * kGroups, kGroups, 1},
                            .recv_count = recv_count.data(),
                            .expert_offset = offset.data(),
                            .topk_idx = choices.data(),
                            .topk_weights = choice_weights.data(),
                            .num_messages = messages.data(),
                            .routing = routing};
    const CombineInput rows_home{.y = result,
                                 .row_stride = kHidden,
                                 .late_weights = c.late,
                                 .weights = weights.data(),
                                 .num_tokens = c.num_tokens,
                                 .routing = routing};
    const CombineOutput sums{
        .late_weights = c.late, .out = out.data(), .num_tokens = c.num_tokens, .routing = routing};
    // Apart from the default stream, where the other rank of this GPU may be copying; so what was
    // copied there above must have arrived first.
    cudaStream_t stream;
    EP_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    EP_CUDA(cudaDeviceSynchronize());
    const auto handle = reinterpret_cast<StreamHandle>(stream);
    const auto pair = [&](What what) {
        if (c.fused) {
            if (what != What::kCombine) rank.dispatch_fused(0, in, target, c.num_tokens, handle);
            if (what != What::kDispatch) {
                rank.combine_fused(0, rows_home, sums, c.num_tokens, handle);
            }
            return;
        }
        rank.dispatch_send(0, in, handle);
        rank.dispatch_recv(0, target, c.num_tokens, handle);
        rank.combine_send(0, rows_home, c.num_tokens, handle);
        rank.combine_recv(0, sums, handle);
    };
    shared.line.meet();
    pair(What::kPair);
    EP_CUDA(cudaStreamSynchronize(stream));
    const bool checked = c.wire == Wire::kBf16 && !compact;
    shared.error[me] = checked ? largest_error(host.x, out.data()) : -1;

    shared.times[me] =
        time_replays(shared.line, me, stream, kPairs, kReplays, [&] { pair(c.what); });
    EP_CUDA(cudaStreamDestroy(stream));
    shared.line.meet();  // all are done before anybody's memory goes
}

// A rank that throws would leave the others in a barrier, so the program ends here.
void run_or_exit(int me, const Case& c, const Place& place, Shared& shared) {
    try {
        run_rank(me, c, place, shared);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d, %s T=%d: %s\n", me, c.name, c.num_tokens, error.what());
        std::_Exit(1);
    }
}

// Returns whether the case was right, as far as it checks itself.
bool measure(const Case& c, const Place& place) {
    const Shape shape{place.ranks, c.num_experts, kTopk, kHidden, std::max(128, c.num_tokens),
                      1,           c.wire,        0,     0};
    Shared shared(shape, place);
    std::vector<std::thread> others;
    for (int r = 1; r < place.ranks; ++r) {
        others.emplace_back([&, r] { run_or_exit(r, c, place, shared); });
    }
    run_or_exit(0, c, place, shared);
    for (std::thread& other : others) other.join();
    const std::vector<float> slowest = slowest_times(shared.times);
    std::printf("%-16s T=%4d E=%3d %s pdl=%d: median %.2f us (%.2f-%.2f)", c.name, c.num_tokens,
                c.num_experts, c.fused ? "fused" : "split", c.pdl, slowest[kReplays / 2],
                slowest.front(), slowest.back());
    bool right = true;
    if (shared.error[0] >= 0) {
        const double worst = *std::max_element(shared.error.begin(), shared.error.end());
        std::printf("  largest error %.2g", worst);
        right = worst <= kErrorLimit;
        if (!right) std::printf(" WRONG");
    }
    for (int rank = 0; rank < place.ranks; ++rank) {
        const Fault& fault = reinterpret_cast<FaultBoard*>(shared.faults[rank].address())->fatal;
        if (fault.code == 0) continue;
        right = false;
        std::printf("  FAULT %u on rank %d, operation %u, peer %d: expected %llu, seen %llu",
                    fault.code, rank, fault.op, fault.peer,
                    static_cast<unsigned long long>(fault.expected),
                    static_cast<unsigned long long>(fault.seen));
    }
    std::puts("");
    std::fflush(stdout);
    return right;
}

// With `pdl`, two kernels of a rank can be resident at once, the second waiting for the first.
// Ranks of one GPU wait for each other as well, so everything that can be resident together must
// fit.
Place on_one_gpu(int ranks, bool pdl, int num_sms) {
    const int kernels = ranks * (pdl ? 2 : 1);
    return {ranks, std::vector<int>(ranks),
            num_sms > 0 ? num_sms : device_attributes(0).at("num_sms") / kernels};
}

Place on_gpus(int ranks, int num_sms) {
    Place place{ranks, std::vector<int>(ranks), num_sms};
    for (int r = 0; r < ranks; ++r) {
        place.device[r] = r;
        for (int peer = 0; peer < ranks; ++peer) {
            if (peer != r) enable_peer_access(r, peer);
        }
    }
    return place;
}

struct Options {
    bool one_gpu = false;
    bool fused_only = false;
    bool parts = false;
    bool late = false;
    int num_sms = 0;
    int num_tokens = 0;
    int ranks = 2;
};

bool parse(int argc, char** argv, Options& options) {
    for (int i = 1; i < argc; ++i) {
        if (std::strcmp(argv[i], "--one-gpu") == 0) {
            options.one_gpu = true;
        } else if (std::strcmp(argv[i], "--fused") == 0) {
            options.fused_only = true;
        } else if (std::strcmp(argv[i], "--parts") == 0) {
            options.parts = true;
        } else if (std::strcmp(argv[i], "--late") == 0) {
            options.late = true;
        } else if (std::strcmp(argv[i], "--tokens") == 0 && i + 1 < argc) {
            options.num_tokens = std::atoi(argv[++i]);
            if (options.num_tokens < 1) return false;
        } else if (std::strcmp(argv[i], "--ranks") == 0 && i + 1 < argc) {
            options.ranks = std::atoi(argv[++i]);
            if (options.ranks < 1 || options.ranks > kMostRanks) return false;
        } else if (std::strcmp(argv[i], "--sms") == 0 && i + 1 < argc) {
            options.num_sms = std::atoi(argv[++i]);
            if (options.num_sms < 1) return false;
        } else {
            return false;
        }
    }
    return true;
}

bool measure_parts(const Place& place, int num_tokens, bool late) {
    bool right = true;
    for (const auto& [format, kind] :
         {std::pair{Format::kBatched, "batched"}, std::pair{Format::kCompact, "compact"}}) {
        if (late && format == Format::kCompact) continue;
        for (const auto& [what, part] :
             {std::pair{What::kPair, "pair"}, std::pair{What::kDispatch, "dispatch"},
              std::pair{What::kCombine, "combine"}}) {
            const std::string name = std::string(kind) + " " + part;
            std::vector<int> sizes{1, 8, 32, 64, 128, 256, 512, 1024};
            if (num_tokens > 0) sizes = {num_tokens};
            for (const int t : sizes) {
                right &= measure({name.c_str(), t, 256, Wire::kFp8, format, true, kPdl, what, late},
                                 place);
            }
        }
    }
    return right;
}

bool measure_all(const Place& place, bool fused_only, bool late) {
    bool right = true;
    for (const bool fused : {false, true}) {
        if (fused_only && !fused) continue;
        for (const int t : {1, 8, 128}) {
            right &= measure({"bf16 batched", t, 256, Wire::kBf16, Format::kBatched, fused, kPdl,
                              What::kPair, late},
                             place);
        }
    }
    if (late) return right;
    for (const bool fused : {false, true}) {
        if (fused_only && !fused) continue;
        for (const int t : {1, 8, 32, 64, 128, 512, 1024}) {
            right &=
                measure({"fp8 batched", t, 256, Wire::kFp8, Format::kBatched, fused, kPdl}, place);
        }
    }
    for (const int t : {1, 8, 32, 64, 128, 512, 1024}) {
        right &= measure({"fp8 compact", t, 256, Wire::kFp8, Format::kCompact, true, kPdl}, place);
    }
    for (const int t : {512, 1024}) {
        right &=
            measure({"fp8 contiguous", t, 256, Wire::kFp8, Format::kContiguous, true, kPdl}, place);
    }
    return right;
}

}  // namespace

int main(int argc, char** argv) {
    Options options;
    if (!parse(argc, argv, options)) {
        std::fprintf(stderr,
                     "usage: %s [--ranks R] [--one-gpu] [--sms N] [--fused] [--parts] [--tokens T] "
                     "[--late], R at most 8\n",
                     argv[0]);
        return 2;
    }
    const int gpus = device_count();
    if (gpus == 0) {
        std::fprintf(stderr, "a GPU is needed, none here\n");
        return 1;
    }
    const bool shares = options.one_gpu || gpus < options.ranks;
    const Place place = shares ? on_one_gpu(options.ranks, kPdl, options.num_sms)
                               : on_gpus(options.ranks, options.num_sms);
    if (shares) {
        std::printf("%d ranks on one GPU, %d SMs' worth of CTAs each: no link is measured\n",
                    place.ranks, place.num_sms);
    }
    const bool right = options.parts ? measure_parts(place, options.num_tokens, options.late)
                                     : measure_all(place, options.fused_only, options.late);
    return right ? 0 : 1;
}

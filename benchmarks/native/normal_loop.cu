// Normal operations between two ranks of one process, without Python: for work on the kernels.
//
//   nvcc -std=c++20 -O3 -arch=sm_90 -Icsrc -o build/normal_loop benchmarks/native/normal_loop.cu
//       csrc/cuda/normal_kernels.cu csrc/cuda/normal_rank.cu csrc/cuda/memory.cu  (all on one line)
//   build/normal_loop [--one-gpu] [--check] [--raw] [--hard] [--tokens T] [--sms 8,24,0]
//
// A rank per GPU where there are two. With one, or with --one-gpu, both share GPU 0, each on a
// stream of its own: no link is measured then. --sms 0 is all SMs (half of them on a shared GPU).
// --raw: rows of combines are not packed. --hard: some cannot be, or have escapes.
//
// Every line is checked first, BF16 and FP8 alike: the received block against one that the host
// lays out from the same inputs, the combined rows against FP32 sums rounded once; every byte must
// be equal. Then graphs of kRepeats operations are replayed, one host thread per rank; printed are
// the slower rank's median, least and most of kReplays. --check stops after the checks (for
// compute-sanitizer). Exit status 1 if a line was wrong or a rank recorded a fault.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cuda/normal_rank.h"
#include "normal_inputs.h"
#include "replays.cuh"

namespace {

using namespace ep;

constexpr int kRepeats = 10;
constexpr int kReplays = 12;
constexpr uint64_t kBudgetNs = 2'000'000'000;

struct Options {
    bool one_gpu = false;
    bool check_only = false;
    bool may_pack = true;
    Values values = Values::kUsual;
    int num_tokens = 4096;
    std::vector<int> sms = {8, 24, 0};
};

int64_t control_bytes() { return normal::ControlLayout::make(kRanks, kExperts).bytes; }

// What the two threads share.
struct Shared {
    Options options;
    std::vector<int> device;  // of each rank
    int64_t block_bytes, data_bytes;
    std::vector<Inputs> inputs;
    std::deque<DeviceMemory> controls, datas;
    StartLine line;
    std::vector<std::vector<float>> times;
    bool right[kRanks] = {true, true};

    Shared(const Options& o, bool on_one_gpu)
        : options(o), device{0, on_one_gpu ? 0 : 1}, line(device), times(kRanks) {
        block_bytes =
            normal::BlockLayout::make(most_rows(), kBf16.row_bytes, kFp8.num_scales, kTopk).bytes;
        data_bytes = block_bytes + normal::InboxLayout::make(o.num_tokens, kHidden, kTopk).bytes;
        for (int r = 0; r < kRanks; ++r) {
            controls.emplace_back(control_bytes(), device[r]);
            datas.emplace_back(data_bytes, device[r]);
            inputs.emplace_back(r, o.num_tokens, o.values);
        }
    }
    int64_t most_rows() const { return int64_t{kRanks} * options.num_tokens; }
};

// One rank's thread.
struct Rank {
    Shared& shared;
    int me, gpu, num_tokens;
    const Inputs& in;
    DeviceMemory local;
    PinnedMemory faults;
    CudaNormal ops;
    cudaStream_t stream = nullptr;
    Array<uint8_t> x;
    Array<uint32_t> scales;
    Array<int64_t> topk_idx;
    Array<float> weights;
    Array<uint16_t> y, out;
    Array<int32_t> per_rank, per_expert, prefix, position, counts;
    Array<uint8_t> in_rank;

    static std::vector<std::uintptr_t> addresses(const std::deque<DeviceMemory>& memories) {
        std::vector<std::uintptr_t> found;
        for (const DeviceMemory& memory : memories) found.push_back(memory.address());
        return found;
    }
    Rank(Shared& s, int rank)
        : shared(s),
          me(rank),
          gpu(s.device[rank]),
          num_tokens(s.options.num_tokens),
          in(s.inputs[rank]),
          local(sizeof(normal::State), gpu),
          faults(4096),
          ops(kRanks, rank, kExperts, addresses(s.controls), addresses(s.datas), s.data_bytes,
              local.address(), faults.address(), gpu),
          x(in.x, gpu),
          scales(in.scales, gpu),
          topk_idx(in.topk_idx, gpu),
          weights(in.weights, gpu),
          y(in.y, gpu),
          out(static_cast<size_t>(num_tokens) * kHidden, gpu),
          per_rank(kRanks, gpu),
          per_expert(kExperts, gpu),
          prefix(kRanks * kRanks, gpu),
          position(static_cast<size_t>(num_tokens) * kRanks, gpu),
          counts(kLocalExperts, gpu),
          in_rank(static_cast<size_t>(num_tokens) * kRanks, gpu) {
        ops.set_time_budget(kBudgetNs);
        EP_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        EP_CUDA(cudaDeviceSynchronize());
    }
    ~Rank() { cudaStreamDestroy(stream); }

    StreamHandle handle() const { return reinterpret_cast<StreamHandle>(stream); }
    NormalTables tables() const { return {prefix.data(), position.data()}; }
    NormalRoutes routes() const { return {topk_idx.data(), 8, weights.data(), kTopk}; }
    uint8_t* data() const { return reinterpret_cast<uint8_t*>(shared.datas[me].address()); }

    void count() const {
        const NormalLayout layout{per_rank.data(), per_expert.data(), in_rank.data()};
        ops.layout(routes(), num_tokens, kExperts, layout, handle());
        ops.notify(layout, num_tokens, kExperts, 1, tables(), counts.data(), nullptr, handle());
    }
    void dispatch(const Rows& rows, int num_sms) const {
        ops.dispatch({x.data(), rows.row_bytes, rows.row_bytes, scales.data(), rows.num_scales, 1,
                      rows.num_scales, num_tokens},
                     routes(), kExperts, tables(), 0, shared.most_rows(),
                     normal::BlockSize::kPadded, num_sms, handle());
    }
    void combine(int num_sms) const {
        ops.combine({reinterpret_cast<const uint8_t*>(y.data()),
                     2 * kHidden,
                     kHidden,
                     nullptr,
                     0,
                     {nullptr, nullptr},
                     num_tokens,
                     shared.block_bytes,
                     out.data(),
                     nullptr,
                     nullptr,
                     shared.options.may_pack},
                    tables(), num_sms, handle());
    }

    void wrong(const char* what, int64_t at) const {
        std::printf("  rank %d: wrong %s at %lld\n", me, what, static_cast<long long>(at));
        shared.right[me] = false;
    }
    template <class T>
    void expect(const char* what, const uint8_t* got, const T* wanted, int64_t count) const {
        const auto* values = reinterpret_cast<const T*>(got);
        for (int64_t i = 0; i < count; ++i) {
            if (std::memcmp(values + i, wanted + i, sizeof(T)) != 0) return wrong(what, i);
        }
    }
    void check_dispatch(const Rows& rows) const;
    void check_combine() const;
    void check_faults() const {
        const Fault& fault = reinterpret_cast<const FaultBoard*>(faults.address())->fatal;
        if (fault.code == 0) return;
        std::printf("  rank %d: FAULT %u of op %u, peer %d\n", me, fault.code, fault.op,
                    fault.peer);
        shared.right[me] = false;
    }
};

// The block of this rank, laid out from everybody's inputs.
void Rank::check_dispatch(const Rows& rows) const {
    const int64_t most = shared.most_rows();
    const auto layout = normal::BlockLayout::make(most, rows.row_bytes, rows.num_scales, kTopk);
    std::vector<uint8_t> block(static_cast<size_t>(layout.bytes));
    EP_CUDA(cudaMemcpy(block.data(), data(), block.size(), cudaMemcpyDeviceToHost));
    int64_t row = 0;
    for (int s = 0; s < kRanks; ++s) {
        const Inputs& from = shared.inputs[s];
        for (int32_t t = 0; t < num_tokens; ++t) {
            if (!from.goes(t, me)) continue;
            if (std::memcmp(block.data() + layout.x + row * rows.row_bytes,
                            from.x.data() + int64_t{t} * rows.row_bytes, rows.row_bytes) != 0) {
                return wrong("row", row);
            }
            expect("scales", block.data() + layout.scales + row * rows.num_scales * 4,
                   from.scales.data() + int64_t{t} * rows.num_scales, rows.num_scales);
            int64_t experts[kTopk];
            float chosen[kTopk];
            for (int k = 0; k < kTopk; ++k) {
                const int64_t expert = from.topk_idx[t * kTopk + k];
                const bool here = expert / kLocalExperts == me;
                experts[k] = here ? expert - int64_t{me} * kLocalExperts : -1;
                chosen[k] = here ? from.weights[t * kTopk + k] : 0.0f;
            }
            expect("topk_idx", block.data() + layout.topk_idx + row * kTopk * 8, experts, kTopk);
            expect("topk_weights", block.data() + layout.topk_weights + row * kTopk * 4, chosen,
                   kTopk);
            expect("source_token", block.data() + layout.source_token + row * 4, &t, 1);
            ++row;
        }
    }
    const std::vector<int64_t> nobody(static_cast<size_t>((most - row) * kTopk), -1);
    expect("padding", block.data() + layout.topk_idx + row * kTopk * 8, nobody.data(),
           (most - row) * kTopk);
}

void Rank::check_combine() const {
    int64_t next[kRanks] = {};  // this rank's next row in each rank's y
    for (int d = 0; d < kRanks; ++d) {
        for (int s = 0; s < me; ++s) {
            for (int t = 0; t < num_tokens; ++t) next[d] += shared.inputs[s].goes(t, d);
        }
    }
    const std::vector<uint16_t> got = out.copy();
    std::vector<float> sum(kHidden);
    for (int t = 0; t < num_tokens; ++t) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int d = 0; d < kRanks; ++d) {
            if (!in.goes(t, d)) continue;
            const uint16_t* row = shared.inputs[d].y.data() + next[d]++ * kHidden;
            for (int i = 0; i < kHidden; ++i) sum[i] += bf16_to_float(row[i]);
        }
        for (int i = 0; i < kHidden; ++i) {
            const int64_t at = int64_t{t} * kHidden + i;
            if (got[at] != float_to_bf16(sum[i])) return wrong("sum", at);
        }
    }
}

void report(const Shared& shared, const std::string& name) {
    const std::vector<float> slower = slowest_times(shared.times);
    std::printf("  %-20s %7.1f us (%.1f-%.1f)\n", name.c_str(), slower[kReplays / 2],
                slower.front(), slower.back());
    std::fflush(stdout);
}

void measure(Rank& rank, const std::string& name, const std::function<void()>& work) {
    Shared& shared = rank.shared;
    shared.times[rank.me] =
        time_replays(shared.line, rank.me, rank.stream, kRepeats, kReplays, work);
    shared.line.meet();
    if (rank.me == 0) report(shared, name);
    shared.line.meet();
}

void check(Rank& rank, int sms) {
    rank.shared.line.meet();
    for (const Rows& rows : {kBf16, kFp8}) {
        EP_CUDA(cudaMemsetAsync(rank.data(), 0xab, rank.shared.data_bytes, rank.stream));
        EP_CUDA(cudaMemsetAsync(rank.out.data(), 0xab, int64_t{rank.num_tokens} * 2 * kHidden,
                                rank.stream));
        EP_CUDA(cudaStreamSynchronize(rank.stream));
        rank.shared.line.meet();
        rank.count();
        rank.dispatch(rows, sms);
        rank.combine(sms);
        EP_CUDA(cudaStreamSynchronize(rank.stream));
        rank.check_dispatch(rows);
        rank.check_combine();
        rank.check_faults();
        rank.shared.line.meet();
    }
}

void run_rank(Shared& shared, int me) {
    EP_CUDA(cudaSetDevice(shared.device[me]));
    Rank rank(shared, me);
    for (const int asked : shared.options.sms) {
        int sms = asked;
        if (sms == 0) sms = device_attributes(rank.gpu).at("num_sms") / (shared.device[1] ? 1 : 2);
        if (me == 0) std::printf("%d SMs, T=%d\n", sms, rank.num_tokens);
        check(rank, sms);
        if (shared.options.check_only) continue;
        measure(rank, "counts", [&] { rank.count(); });
        for (const Rows& rows : {kBf16, kFp8}) {
            const std::string name = rows.name;
            measure(rank, "dispatch " + name, [&] {
                rank.count();
                rank.dispatch(rows, sms);
            });
            measure(rank, "cached " + name, [&] { rank.dispatch(rows, sms); });
        }
        measure(rank, "combine", [&] { rank.combine(sms); });
        measure(rank, "pair FP8", [&] {
            rank.count();
            rank.dispatch(kFp8, sms);
            rank.combine(sms);
        });
        rank.check_faults();
    }
    shared.line.meet();  // both are done before either's memory goes
}

// A rank that throws would leave the other in a barrier, so the program ends here.
void run_or_exit(Shared& shared, int me) {
    try {
        run_rank(shared, me);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", me, error.what());
        std::_Exit(1);
    }
}

bool parse(int argc, char** argv, Options& options) {
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        if (name == "--one-gpu") {
            options.one_gpu = true;
        } else if (name == "--check") {
            options.check_only = true;
        } else if (name == "--raw") {
            options.may_pack = false;
        } else if (name == "--hard") {
            options.values = Values::kHard;
        } else if (name == "--tokens" && i + 1 < argc) {
            options.num_tokens = std::atoi(argv[++i]);
            if (options.num_tokens < 1) return false;
        } else if (name == "--sms" && i + 1 < argc) {
            options.sms.clear();
            for (char* at = std::strtok(argv[++i], ","); at; at = std::strtok(nullptr, ",")) {
                options.sms.push_back(std::atoi(at));
                if (options.sms.back() < 0) return false;
            }
        } else {
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    Options options;
    if (!parse(argc, argv, options)) {
        std::fprintf(
            stderr, "usage: %s [--one-gpu] [--check] [--raw] [--hard] [--tokens T] [--sms N,...]\n",
            argv[0]);
        return 2;
    }
    const int gpus = device_count();
    if (gpus == 0) {
        std::fprintf(stderr, "a GPU is needed, none here\n");
        return 1;
    }
    const bool together = options.one_gpu || gpus == 1;
    if (together) {
        std::puts("both ranks on one GPU: no link is measured");
    } else {
        enable_peer_access(0, 1);
        enable_peer_access(1, 0);
    }
    Shared shared(options, together);
    std::thread second([&] { run_or_exit(shared, 1); });
    run_or_exit(shared, 0);
    second.join();
    return shared.right[0] && shared.right[1] ? 0 : 1;
}

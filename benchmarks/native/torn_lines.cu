// Do lines stay whole? The kernels take a line of 128 bytes whose last word is its tag as there
// once the tag is (docs/architecture.md): this looks for lines of which that is not true.
//
//   nvcc -std=c++20 -O3 -arch=sm_90 -Icsrc -o build/torn_lines benchmarks/native/torn_lines.cu
//       csrc/cuda/memory.cu   (all on one line)
//   build/torn_lines [MILLISECONDS]      (of each case; 500)
//
// Writers store messages of 8 KiB to the same places again and again, every word a function of its
// place and of the writing's number; readers on the GPU that has the memory look at lines, as warps
// that receive do, all the while. A line is torn if its words are not all of its tag's writing. The
// messages come from the same GPU, and from another where there are two, stored by lanes of a warp,
// by the copy engine, and, to show that the readers would see it, in halves of 64 bytes (these must
// be torn). Exit status 1 if whole lines were torn, halves were not, or a case saw too little.
#include <cstdio>
#include <cstdlib>

#include "cuda/error.h"
#include "cuda/memory.h"
#include "cuda/ptx.cuh"

namespace {

using namespace ep;

constexpr int kMessages = 32;  // a CTA writes each, and a CTA reads each
constexpr int kThreads = 256;
constexpr int kVectors = 512;  // of a message
constexpr unsigned long long kLeastLines = 1'000'000;  // seen new, of every case

enum class Store { kLanes, kBulk, kHalves };

struct Seen {
    unsigned long long lines;  // with another tag than at the last look
    unsigned long long torn;
};

__device__ uint64_t word_of(uint64_t number, int message, int word) {
    return (number * 0x9e3779b97f4a7c15ull) ^ (static_cast<uint64_t>(message) << 32 | word);
}
__device__ ptx::Vector vector_of(uint64_t number, int message, int v) {
    const bool last = v % 8 == 7;
    return {word_of(number, message, 2 * v), last ? number : word_of(number, message, 2 * v + 1)};
}

// A writing takes its stage anew, as that of a dispatch does.
template <Store kStore>
__global__ void write_kernel(uint8_t* inbox, uint64_t nanoseconds) {
    __shared__ __align__(128) ptx::Vector stage[kVectors];
    const int message = static_cast<int>(blockIdx.x);
    auto* to = reinterpret_cast<ptx::Vector*>(inbox) + message * kVectors;
    const uint64_t end = ptx::global_timer_ns() + nanoseconds;
    for (uint64_t number = 1;; ++number) {
        const bool over = ptx::global_timer_ns() > end;
        if (__syncthreads_or(over) != 0) return;
        for (int v = threadIdx.x; v < kVectors; v += kThreads) {
            stage[v] = vector_of(number, message, v);
        }
        ptx::fence_async();
        __syncthreads();
        if (kStore == Store::kBulk && threadIdx.x == 0) {
            ptx::start_store(to, stage, sizeof(stage));
            ptx::commit_stores();
            ptx::await_stores_read<0>();
        }
        for (int v = threadIdx.x; kStore != Store::kBulk && v < kVectors; v += kThreads) {
            const bool later = kStore == Store::kHalves && v % 8 >= 4;
            if (!later) ptx::store_line_vector(to + v, stage[v]);
            __syncwarp();
            if (later) ptx::store_line_vector(to + v, stage[v]);
        }
        __syncthreads();
    }
}

__global__ void read_kernel(const uint8_t* inbox, uint64_t nanoseconds, Seen* seen) {
    const int message = static_cast<int>(blockIdx.x);
    const auto* from = reinterpret_cast<const ptx::Vector*>(inbox) + message * kVectors;
    const uint64_t end = ptx::global_timer_ns() + nanoseconds;
    constexpr int kLooks = kVectors / kThreads;
    uint64_t last[kLooks] = {};
    unsigned long long lines = 0, torn = 0;
    while (ptx::global_timer_ns() < end) {
        for (int u = 0; u < kLooks; ++u) {
            const int v = static_cast<int>(threadIdx.x) + u * kThreads;
            const ptx::Vector found = ptx::load_line_vector(from + v);
            const uint64_t tag = __shfl_sync(0xffffffffu, found.hi, (threadIdx.x & 31) | 7);
            const ptx::Vector right = vector_of(tag, message, v);
            const bool wrong = tag != 0 && (found.lo != right.lo || found.hi != right.hi);
            const unsigned mine = 0xffu << (threadIdx.x & 24);
            const bool broken = (__ballot_sync(0xffffffffu, wrong) & mine) != 0;
            if ((threadIdx.x & 7) != 7 || tag == last[u]) continue;
            last[u] = tag;
            ++lines;
            torn += broken;
        }
    }
    atomicAdd(&seen->lines, lines);
    atomicAdd(&seen->torn, torn);
}

struct Case {
    const char* what;
    void (*write)(uint8_t*, uint64_t);
    bool may_tear;
};
constexpr Case kCases[] = {
    {"lanes of a warp", write_kernel<Store::kLanes>, false},
    {"copy engine", write_kernel<Store::kBulk>, false},
    {"halves of lines", write_kernel<Store::kHalves>, true},
};

cudaStream_t stream_on(int device) {
    EP_CUDA(cudaSetDevice(device));
    cudaStream_t stream;
    EP_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
}

// Written from `writer` to memory of GPU 0.
Seen see(const Case& c, int writer, uint64_t nanoseconds) {
    const DeviceMemory inbox(int64_t{kMessages} * kVectors * 16, 0);
    const DeviceMemory result(sizeof(Seen), 0);
    const cudaStream_t reads = stream_on(0), writes = stream_on(writer);
    c.write<<<kMessages, kThreads, 0, writes>>>(reinterpret_cast<uint8_t*>(inbox.address()),
                                                nanoseconds);
    EP_CUDA(cudaGetLastError());
    EP_CUDA(cudaSetDevice(0));
    read_kernel<<<kMessages, kThreads, 0, reads>>>(
        reinterpret_cast<const uint8_t*>(inbox.address()), nanoseconds,
        reinterpret_cast<Seen*>(result.address()));
    EP_CUDA(cudaGetLastError());
    EP_CUDA(cudaStreamSynchronize(reads));
    EP_CUDA(cudaStreamSynchronize(writes));
    Seen seen{};
    EP_CUDA(cudaMemcpy(&seen, reinterpret_cast<const void*>(result.address()), sizeof(seen),
                       cudaMemcpyDeviceToHost));
    EP_CUDA(cudaStreamDestroy(reads));
    EP_CUDA(cudaStreamDestroy(writes));
    return seen;
}

// Returns whether it came out as it must.
bool run(const Case& c, int writer, uint64_t nanoseconds) {
    const Seen seen = see(c, writer, nanoseconds);
    std::printf("from GPU %d, %-16s %12llu new lines seen, %llu torn\n", writer, c.what, seen.lines,
                seen.torn);
    return seen.lines >= kLeastLines && (c.may_tear ? seen.torn > 0 : seen.torn == 0);
}

}  // namespace

int main(int argc, char** argv) {
    const long milliseconds = argc > 1 ? std::atol(argv[1]) : 500;
    const int gpus = device_count();
    if (gpus == 0 || milliseconds < 1) {
        std::fprintf(stderr, gpus == 0 ? "a GPU is needed, none here\n" : "usage: %s [MS]\n",
                     argv[0]);
        return 1;
    }
    if (gpus > 1) enable_peer_access(1, 0);
    // Kernels are loaded when first launched: not while others of theirs run.
    for (int writer = 0; writer < (gpus > 1 ? 2 : 1); ++writer) {
        for (const Case& c : kCases) see(c, writer, 0);
    }
    bool right = true;
    for (int writer = 0; writer < (gpus > 1 ? 2 : 1); ++writer) {
        for (const Case& c : kCases) right &= run(c, writer, 1'000'000ull * milliseconds);
    }
    std::puts(right ? "lines stay whole" : "NOT as it must be");
    return right ? 0 : 1;
}

// What the native loops share: arrays on a GPU, and graphs that all ranks replay together, timed.
// A rank is a thread of the program.
#pragma once

#include <algorithm>
#include <barrier>
#include <deque>
#include <vector>

#include "cuda/error.h"
#include "cuda/memory.h"

namespace ep {

inline constexpr int kMostRanks = 8;

template <class T>
class Array {
  public:
    Array(size_t n, int device) : size_(n), memory_(static_cast<int64_t>(n * sizeof(T)), device) {}
    Array(const std::vector<T>& values, int device) : Array(values.size(), device) {
        EP_CUDA(cudaMemcpy(data(), values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    T* data() const { return reinterpret_cast<T*>(memory_.address()); }
    std::vector<T> copy() const {
        std::vector<T> values(size_);
        EP_CUDA(cudaMemcpy(values.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }

  private:
    size_t size_;
    DeviceMemory memory_;
};

// A word of each rank, in its GPU's memory.
struct Numbers {
    volatile int* of[kMostRanks];
};

// Lets the ranks' streams start together: each waits, boundedly, for the others' numbers.
static __global__ void start_kernel(Numbers numbers, int ranks, int me, int number) {
    *numbers.of[me] = number;
    __threadfence_system();
    const long long start = clock64();
    for (int r = 0; r < ranks; ++r) {
        while (*numbers.of[r] < number && clock64() - start < 2'000'000'000) {
        }
    }
}

// Where the ranks wait for each other.
class StartLine {
  public:
    explicit StartLine(const std::vector<int>& devices)  // of each rank
        : starts_(devices.size()), threads_(static_cast<std::ptrdiff_t>(devices.size())) {
        for (const int device : devices) numbers_.emplace_back(sizeof(int), device);
    }
    void meet() { threads_.arrive_and_wait(); }
    // What this rank puts on its stream next begins when all have come here.
    void start(int me, cudaStream_t stream) {
        meet();
        Numbers all{};
        for (size_t r = 0; r < numbers_.size(); ++r) {
            all.of[r] = reinterpret_cast<int*>(numbers_[r].address());
        }
        start_kernel<<<1, 1, 0, stream>>>(all, static_cast<int>(numbers_.size()), me,
                                          ++starts_[me]);
        EP_CUDA(cudaGetLastError());
    }

  private:
    std::deque<DeviceMemory> numbers_;
    std::vector<int> starts_;
    std::barrier<> threads_;
};

// Replays a graph of `operations` times `work`, all ranks together: this rank's microseconds an
// operation, replay by replay, after two that are not counted.
template <class Work>
std::vector<float> time_replays(StartLine& line, int me, cudaStream_t stream, int operations,
                                int replays, Work work) {
    constexpr int kWarmups = 2;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    EP_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < operations; ++i) work();
    EP_CUDA(cudaStreamEndCapture(stream, &graph));
    EP_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    EP_CUDA(cudaGraphUpload(exec, stream));
    cudaEvent_t begin, end;
    EP_CUDA(cudaEventCreate(&begin));
    EP_CUDA(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < kWarmups + replays; ++i) {
        line.start(me, stream);
        EP_CUDA(cudaEventRecord(begin, stream));
        EP_CUDA(cudaGraphLaunch(exec, stream));
        EP_CUDA(cudaEventRecord(end, stream));
        EP_CUDA(cudaStreamSynchronize(stream));
        float ms = 0;
        EP_CUDA(cudaEventElapsedTime(&ms, begin, end));
        if (i >= kWarmups) times.push_back(1000 * ms / static_cast<float>(operations));
    }
    EP_CUDA(cudaEventDestroy(begin));
    EP_CUDA(cudaEventDestroy(end));
    EP_CUDA(cudaGraphExecDestroy(exec));
    EP_CUDA(cudaGraphDestroy(graph));
    return times;
}

// The slowest rank's time of every replay, in order of size.
inline std::vector<float> slowest_times(const std::vector<std::vector<float>>& of_ranks) {
    std::vector<float> slowest = of_ranks.front();
    for (const std::vector<float>& times : of_ranks) {
        for (size_t i = 0; i < slowest.size(); ++i) slowest[i] = std::max(slowest[i], times[i]);
    }
    std::sort(slowest.begin(), slowest.end());
    return slowest;
}

}  // namespace ep

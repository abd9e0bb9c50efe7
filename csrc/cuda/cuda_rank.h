// A GPU rank, as the bindings see it: no CUDA types. Operations only launch kernels.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/view.h"

namespace ep {

using StreamHandle = std::uintptr_t;  // cudaStream_t

class CudaRank {
  public:
    struct Options {
        int device;
        int num_sms;  // 0: all
        bool pdl;
    };

    // Addresses of all heaps as this process sees them, of the local memory and of the fault board.
    // Throws std::invalid_argument; loads every kernel, so that no later launch has to.
    CudaRank(const Shape& shape, int rank, const std::vector<std::uintptr_t>& heaps,
             std::uintptr_t local, std::uintptr_t faults, const Options& options);

    void dispatch_send(int chain, const SendInput& in, StreamHandle stream) const;
    void dispatch_recv(int chain, const RecvTarget& target, int expected,
                       StreamHandle stream) const;
    void dispatch_fused(int chain, const SendInput& in, const RecvTarget& target, int expected,
                        StreamHandle stream) const;
    void combine_send(int chain, const uint16_t* y, int64_t row_stride, int expected,
                      StreamHandle stream) const;
    void combine_recv(int chain, uint16_t* out, int num_tokens, const int32_t* num_valid,
                      StreamHandle stream) const;
    void combine_fused(int chain, const uint16_t* y, int64_t row_stride, uint16_t* out,
                       int num_tokens, const int32_t* num_valid, int expected,
                       StreamHandle stream) const;

    // These synchronise; they are for tests, reports and recovery.
    void set_time_budget(uint64_t nanoseconds) const;
    StepStats read_stats(int chain) const;
    ChainState read_state(int chain) const;
    void reset() const;

  private:
    enum Kernel {
        kDispatchSend,
        kDispatchRecv,
        kDispatchFused,
        kCombineSend,
        kCombineRecv,
        kCombineFused,
        kNumKernels
    };

    int expected_tokens(int expected) const;
    int combine_parts() const;
    const View& view(int chain) const;

    Context ctx_{};
    std::vector<View> views_;  // by chain
    Options options_{};
    std::array<int, kNumKernels> resident_{};
    std::array<int64_t, kNumKernels> scratch_{};
};

}  // namespace ep

// A GPU rank, as the bindings see it: no CUDA types. Operations only launch kernels.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/kernels.h"

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
    void combine_send(int chain, const CombineInput& in, int expected, StreamHandle stream) const;
    void combine_recv(int chain, const CombineOutput& out, StreamHandle stream) const;
    void combine_fused(int chain, const CombineInput& in, const CombineOutput& out, int expected,
                       StreamHandle stream) const;

    // Operations behind it in stream order leave the rank out, or no longer do. reset() changes no
    // mask.
    void set_rank_mask(int rank, bool masked, StreamHandle stream) const;
    void clear_rank_mask(StreamHandle stream) const;
    // 1 for each masked rank, else 0, to an int32 [R].
    void write_rank_mask(std::uintptr_t out, StreamHandle stream) const;

    // These synchronise; they are for tests, reports and recovery.
    void set_time_budget(uint64_t nanoseconds) const;
    StepStats read_stats(int chain) const;
    ChainState read_state(int chain) const;
    RankMask read_rank_mask() const;
    void reset() const;

  private:
    enum Kernel {
        kDispatchSend,
        kDispatchRecv,
        kDispatchFused,
        kSendMany,  // dispatches of many tokens
        kRecvMany,
        kFusedMany,
        kNumKernels
    };
    // Combines, by what their sums travel as and how their rows are added up (kernels.h).
    enum CombineKind {
        kSums,
        kLateSums,  // the combine brings its weights
        kFewSums,
        kLateFewSums,
        kStreamedSums,
        kFp8Sums,
        kLateFp8Sums,
        kNumCombineKinds
    };
    enum Half { kSend, kRecv, kBoth, kNumHalves };
    // What a launch of a kernel may use.
    struct Room {
        int resident;  // CTAs at once
        int64_t scratch;  // bytes
    };

    int expected_tokens(int expected) const;
    const View& view(int chain, Wire wire) const;
    const Room& room(Kernel kernel, Wire wire) const;
    // For sums of so many units, of a step in which every rank has `tokens`.
    CombineKind combine_kind(Half half, Wire sums, bool late_weights, int64_t units,
                             int tokens) const;
    static CombineKernels combine_kernels(CombineKind kind);
    static int warps_to_a_unit(CombineKind kind) {
        return kind == kFewSums || kind == kLateFewSums ? 2 : 1;
    }
    Room load(const void* kernel, int threads, int64_t scratch) const;
    static void require_room(const Room& room, int least, const char* what);
    void prepare(Wire wire);
    void prepare_combines();
    void require_combine(Wire wire) const;

    Context ctx_{};
    std::array<std::vector<View>, kNumWires> views_;  // by wire format, then chain
    std::array<std::array<Room, kNumKernels>, kNumWires> room_{};
    std::array<std::array<Room, kNumHalves>, kNumCombineKinds> combine_room_{};
    Options options_{};
    int num_sms_ = 0;
    int most_shared_ = 0;  // bytes of a CTA
    int l2_bytes_ = 0;
};

}  // namespace ep

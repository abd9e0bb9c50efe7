// A GPU rank's end of the wire: what waits, and puts over memory that both sides map. Puts over a
// network are in the extension that links NVSHMEM (csrc/nvshmem_puts.cu).
#pragma once

#include <vector>

#include "cuda/normal_rank.h"
#include "ep/wire.h"

namespace ep {

// Operations launch one kernel each and are capturable; they throw std::invalid_argument.
class CudaWire {
  public:
    // regions: of every rank, as this GPU sees them; only this rank's own where others put by
    // NVSHMEM. counters: this rank's own, zeroed.
    CudaWire(const CudaNormal& whole, const CudaNormal& rail, const wire::Region& region,
             const std::vector<std::uintptr_t>& regions, std::uintptr_t counters, int device);

    void announce(const wire::Message& message, StreamHandle stream) const;
    void put(const wire::Transfer& transfer, int num_sms, StreamHandle stream) const;
    void await_messages(int num_experts, StreamHandle stream) const;
    void tables(const wire::Tables& tables, StreamHandle stream) const;
    void await_rows(wire::Way way, StreamHandle stream) const;
    void reset() const;  // synchronises

    std::uintptr_t mine() const { return reinterpret_cast<std::uintptr_t>(regions_[own_]); }
    std::uintptr_t counters() const { return reinterpret_cast<std::uintptr_t>(counters_); }
    // This rank's abort word: NVSHMEM's kernels stop for it.
    std::uintptr_t abort_word() const;

  private:
    const CudaNormal& whole_;
    const CudaNormal& rail_;
    wire::Region region_;
    uint8_t* regions_[kMaxRanks] = {};
    int own_;
    wire::Counters* counters_;
    int device_;
};

}  // namespace ep

// Puts between CPU ranks: copies into regions of shared memory. The steps of the CUDA kernels.
#pragma once

#include <vector>

#include "ep/wire.h"
#include "host/normal_rank.h"

namespace ep::host {

class HostWire {
  public:
    // regions: every rank's, as this process sees them. counters: this rank's own, zeroed.
    HostWire(NormalRank& whole, NormalRank& rail, const wire::Region& region,
             const std::vector<uintptr_t>& regions, uintptr_t counters);

    void announce(const wire::Message& message);
    void await_messages(int num_experts);
    void tables(const wire::Tables& tables);
    void put(const wire::Transfer& transfer);
    void await_rows(wire::Way way);
    void reset();

  private:
    uint64_t* signal(int64_t offset) const;
    void put_one(int rank, const wire::Put& put, uint64_t epoch) const;
    void deliver(int num_experts, uint64_t epoch);
    void write_message(NormalRank& rank, int source, const int32_t* counts, int num_counts,
                       const int32_t* experts, int num_experts) const;
    void grant_out();
    void grant_home();

    NormalRank& whole_;
    NormalRank& rail_;
    wire::Region region_;
    std::vector<uint8_t*> regions_;
    wire::Counters* counters_;
    uint8_t* mine_;
};

}  // namespace ep::host

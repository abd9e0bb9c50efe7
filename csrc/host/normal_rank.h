// A CPU rank's normal operations: the steps of the CUDA kernels over plain shared memory. Every
// call returns when its work is done; waits are bounded.
#pragma once

#include <cstdint>
#include <vector>

#include "ep/heap.h"
#include "ep/normal_tensors.h"
#include "host/waiter.h"

namespace ep::host {

class HostWire;

class NormalRank {
  public:
    NormalRank(int num_ranks, int rank, int max_experts, const std::vector<uintptr_t>& control,
               const std::vector<uintptr_t>& data, int64_t data_bytes, uintptr_t local,
               uintptr_t fault, const normal::Part& part = {});

    // Out-of-range experts count as none and are recorded as a routing fault.
    void layout(const NormalRoutes& routes, int num_tokens, int num_experts,
                const NormalLayout& into);
    void notify(const NormalLayout& layout, int num_tokens, int num_experts, int alignment,
                const NormalTables& tables, int32_t* recv_counts, int32_t* host_counts);
    void dispatch(const NormalRows& rows, const NormalRoutes& routes, int num_experts,
                  const NormalTables& tables, int64_t block_offset, int64_t block_rows,
                  normal::BlockSize size);
    void combine(const NormalCombine& work, const NormalTables& tables);

    void set_time_budget(uint64_t nanoseconds);
    void reset();  // zeroes this rank's control heap and its own words, but for the budget
    const normal::State& state() const { return *state_; }

  private:
    friend class HostWire;  // sets words on behalf of peers that only put

    uint8_t* notify_slot(int owner, uint64_t epoch, int source) const;
    normal::Credit* credit(int64_t offset, int owner, int source) const;
    uint64_t* done(int owner, int source) const;
    uint64_t* chunks(int owner, int source) const;
    void publish_credit(int64_t offset, const normal::Credit& credit) const;
    void require_block(int64_t offset, int64_t bytes, const char* what) const;

    bool fits(const normal::Credit& granted, int64_t bytes, uint64_t terms, Where where,
              int owner) const;

    bool place_tokens(const NormalLayout& layout, int64_t num_tokens, int32_t* send_position) const;
    void pad_block(const NormalRoutes& routes, const normal::BlockLayout& block, int64_t offset,
                   int64_t first, int64_t rows) const;
    bool send_rows(const NormalRows& rows, const NormalRoutes& routes, int num_experts,
                   const NormalTables& tables, int destination, const normal::Credit& credit) const;
    bool send_back(const NormalCombine& work, const int32_t* rank_prefix, int source,
                   const normal::Credit& granted) const;
    void reduce(const NormalCombine& work, const NormalTables& tables) const;
    int64_t inbox_row(const int32_t* rank_prefix, int source, int from) const;

    Context context_{};  // for waits and faults: control heaps stand where heaps do
    normal::ControlLayout control_;
    std::vector<uint8_t*> data_;
    int64_t data_bytes_;
    normal::State* state_;
};

}  // namespace ep::host

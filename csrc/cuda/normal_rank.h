// A GPU rank's normal operations, as the bindings see them: no CUDA types. Operations only launch.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/cuda_rank.h"
#include "cuda/normal_group.h"

namespace ep {

class CudaNormal {
  public:
    // Addresses of all heaps as this process sees them. Throws std::invalid_argument; loads every
    // kernel, so that no later launch has to. Synchronises.
    CudaNormal(int num_ranks, int rank, int max_experts, const std::vector<std::uintptr_t>& control,
               const std::vector<std::uintptr_t>& data, int64_t data_bytes, std::uintptr_t local,
               std::uintptr_t fault, int device, const normal::Part& part = {});

    // Capturable, a kernel each. Bad arguments throw
    // std::invalid_argument before anything is launched.
    void layout(const NormalRoutes& routes, int num_tokens, int num_experts,
                const NormalLayout& into, StreamHandle stream) const;
    void notify(const NormalLayout& layout, int num_tokens, int num_experts, int alignment,
                const NormalTables& tables, int32_t* recv_counts, int32_t* host_counts,
                StreamHandle stream) const;
    void dispatch(const NormalRows& rows, const NormalRoutes& routes, int num_experts,
                  const NormalTables& tables, int64_t block_offset, int64_t block_rows,
                  normal::BlockSize size, int num_sms, StreamHandle stream) const;
    void combine(const NormalCombine& work, const NormalTables& tables, int num_sms,
                 StreamHandle stream) const;

    // What its kernels know; for kernels that set words on behalf of peers (cuda/wire.h).
    const normal::Group& group() const { return group_; }

    // These synchronise; they are for tests, reports and recovery.
    void set_time_budget(uint64_t nanoseconds) const;
    normal::State read_state() const;
    void reset() const;

  private:
    void check_experts(int num_experts, int num_tokens) const;
    void check_block(int64_t offset, int64_t bytes, const char* what) const;
    int grid_for(int num_sms) const;
    FastDiv by_local_experts(int num_experts) const;

    normal::Group group_{};
    int64_t data_bytes_;
    int max_experts_;
    int device_;
    int sm_count_ = 0;
    bool starts_early_ = true;  // programmatic dependent launch
};

}  // namespace ep

// A rank whose operations run on the calling CPU thread, over heaps of plain shared memory.
//
// Same steps, slots, headers and epochs as on CUDA; a message is its payload at the start of its
// slot, then one release store of the epoch into the slot's last 8 bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "ep/heap.h"

namespace ep::host {

inline constexpr uint64_t kDefaultBudgetNs = 10'000'000'000u;

// Holds addresses, owns nothing. Operations on different chains may run on different threads.
class HostRank {
  public:
    // heaps: by rank, each layout bytes long, 128-byte aligned, zeroed, as local and fault are.
    // Throws std::invalid_argument.
    HostRank(const Shape& shape, int rank, const std::vector<uintptr_t>& heaps, uintptr_t local,
             uintptr_t fault);

    // Sends never wait, but for weights that come with a combine. All four are no-ops once a rank
    // of the group has failed, and all throw std::invalid_argument for arguments that no shape
    // allows.
    void dispatch_send(int chain, const SendInput& input);
    void dispatch_recv(int chain, const RecvTarget& target);
    void combine_send(int chain, const CombineInput& in);
    // Rows of the output from *num_valid on, and tokens without expert, are zero.
    void combine_recv(int chain, const CombineOutput& out);

    void set_time_budget(uint64_t nanoseconds);
    // Operations that begin after it leave the rank out, or no longer do. reset() changes no mask.
    void set_rank_mask(int rank, bool masked);
    void clear_rank_mask();
    RankMask read_rank_mask() const;
    StepStats read_stats(int chain) const;
    ChainState read_state(int chain) const;
    // Zeroes this rank's heap and local memory but for budget and mask. Ranks meet before and
    // after.
    void reset();

  private:
    void require_chain(int chain) const;
    void require_tokens(int32_t num_tokens) const;
    void require_wire(Wire wire) const;
    void require_combine(Wire wire) const;

    Context context_{};
};

// Tokens that are real: never more than the tensors have, nor less than none.
inline int32_t valid_tokens(int32_t num_tokens, const int32_t* num_valid) {
    if (num_valid == nullptr || *num_valid >= num_tokens) return num_tokens;
    return *num_valid < 0 ? 0 : *num_valid;
}

}  // namespace ep::host

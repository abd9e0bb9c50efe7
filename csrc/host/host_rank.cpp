#include "host/host_rank.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "host/atomics.h"

namespace ep::host {
namespace {

[[noreturn]] void reject(const std::string& what) { throw std::invalid_argument(what); }

void require_aligned(uintptr_t address, uintptr_t alignment, const std::string& what) {
    if (address == 0) reject(what + " is a null address");
    if (address % alignment != 0) {
        reject(what + " must be " + std::to_string(alignment) + "-byte aligned");
    }
}

}  // namespace

HostRank::HostRank(const Shape& shape, int rank, const std::vector<uintptr_t>& heaps,
                   uintptr_t local, uintptr_t fault) {
    if (const char* reason = invalid_reason(shape)) reject(reason);
    if (rank < 0 || rank >= shape.num_ranks) {
        reject("rank " + std::to_string(rank) + " is not in 0.." +
               std::to_string(shape.num_ranks - 1));
    }
    if (heaps.size() != static_cast<size_t>(shape.num_ranks)) {
        reject("got " + std::to_string(heaps.size()) + " heaps for " +
               std::to_string(shape.num_ranks) + " ranks; give one for each");
    }
    for (size_t r = 0; r < heaps.size(); ++r) {
        require_aligned(heaps[r], kLineBytes, "heap of rank " + std::to_string(r));
        context_.heap[r] = reinterpret_cast<uint8_t*>(heaps[r]);
    }
    require_aligned(local, kLineBytes, "local memory");
    require_aligned(fault, alignof(FaultBoard), "fault memory");
    context_.set_shape(shape);
    context_.rank = rank;
    context_.local = reinterpret_cast<uint8_t*>(local);
    context_.faults = reinterpret_cast<FaultBoard*>(fault);
    if (load_relaxed(context_.budget_ns()) == 0) set_time_budget(kDefaultBudgetNs);
}

void HostRank::set_time_budget(uint64_t nanoseconds) {
    if (nanoseconds == 0) reject("the time budget must be at least 1 ns");
    store_relaxed(reinterpret_cast<uint64_t*>(context_.local + LocalLayout::kBudgetOffset),
                  nanoseconds);
}

void HostRank::set_rank_mask(int rank, bool masked) {
    if (rank < 0 || rank >= context_.shape.num_ranks) {
        reject("rank " + std::to_string(rank) + " is not in 0.." +
               std::to_string(context_.shape.num_ranks - 1));
    }
    uint64_t* word = &context_.mask()->words[rank >> 6];
    const uint64_t bit = RankMask::bit(rank);
    if (masked) {
        __atomic_fetch_or(word, bit, __ATOMIC_RELAXED);
    } else {
        __atomic_fetch_and(word, ~bit, __ATOMIC_RELAXED);
    }
}

void HostRank::clear_rank_mask() {
    for (uint64_t& word : context_.mask()->words) store_relaxed(&word, 0);
}

RankMask HostRank::read_rank_mask() const {
    RankMask mask{};
    for (int i = 0; i < RankMask::kWords; ++i) {
        mask.words[i] = load_relaxed(&context_.mask()->words[i]);
    }
    return mask;
}

StepStats HostRank::read_stats(int chain) const {
    require_chain(chain);
    return *context_.stats(chain);
}

ChainState HostRank::read_state(int chain) const {
    require_chain(chain);
    const ChainState* state = context_.state(chain);
    return {load_relaxed(&state->dispatched), load_relaxed(&state->combined), 0, 0};
}

void HostRank::reset() {
    std::memset(context_.heap[context_.rank], 0, static_cast<size_t>(context_.layout.bytes));
    std::memset(context_.local + LocalLayout::kClaimOffset, 0,
                static_cast<size_t>(context_.local_layout.bytes - LocalLayout::kClaimOffset));
}

void HostRank::require_chain(int chain) const {
    if (chain < 0 || chain >= context_.shape.num_chains) {
        reject("chain " + std::to_string(chain) + " is not in 0.." +
               std::to_string(context_.shape.num_chains - 1));
    }
}

void HostRank::require_wire(Wire wire) const {
    if (!context_.shape.allows(wire)) reject("a wire format that the shape has no room for");
}

void HostRank::require_combine(Wire wire) const {
    if (!context_.shape.allows_combine(wire)) {
        reject("a combine format that the shape has no room for");
    }
}

void HostRank::require_tokens(int32_t num_tokens) const {
    if (num_tokens < 0 || num_tokens > context_.shape.max_tokens) {
        reject("num_tokens " + std::to_string(num_tokens) + " is not in 0.." +
               std::to_string(context_.shape.max_tokens) + "; raise max_tokens");
    }
}

}  // namespace ep::host

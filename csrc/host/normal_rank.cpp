#include "host/normal_rank.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

#include "host/atomics.h"

namespace ep::host {
namespace {

using normal::Credit;
using normal::State;

constexpr uint64_t kDefaultBudgetNs = 60'000'000'000;

// Waits and faults are those of low-latency ranks: the words that they use lie where they look.
static_assert(normal::ControlLayout::kAbortOffset == HeapLayout::kAbortOffset);
static_assert(offsetof(State, budget_ns) == LocalLayout::kBudgetOffset);

[[noreturn]] void reject(const std::string& what) { throw std::invalid_argument(what); }

void require_aligned(uintptr_t address, uintptr_t alignment, const std::string& what) {
    if (address == 0) reject(what + " is a null address");
    if (address % alignment != 0) {
        reject(what + " must be " + std::to_string(alignment) + "-byte aligned");
    }
}

}  // namespace

NormalRank::NormalRank(int num_ranks, int rank, int max_experts,
                       const std::vector<uintptr_t>& control, const std::vector<uintptr_t>& data,
                       int64_t data_bytes, uintptr_t local, uintptr_t fault,
                       const normal::Part& part)
    : data_bytes_(data_bytes), state_(reinterpret_cast<State*>(local)) {
    if (num_ranks < 1 || num_ranks > kMaxRanks) reject("num_ranks is not in 1..72");
    if (rank < 0 || rank >= num_ranks) reject("rank is not in 0..num_ranks - 1");
    if (max_experts < num_ranks || max_experts > kMaxExperts) {
        reject("max_experts is not in num_ranks..1024");
    }
    if (control.size() != static_cast<size_t>(num_ranks) || data.size() != control.size()) {
        reject("give one control heap and one data heap for each of " + std::to_string(num_ranks) +
               " ranks");
    }
    for (size_t r = 0; r < control.size(); ++r) {
        require_aligned(control[r], kLineBytes, "control heap of rank " + std::to_string(r));
        require_aligned(data[r], kLineBytes, "data heap of rank " + std::to_string(r));
        context_.heap[r] = reinterpret_cast<uint8_t*>(control[r]);
        data_.push_back(reinterpret_cast<uint8_t*>(data[r]));
    }
    require_aligned(local, alignof(State), "local memory");
    require_aligned(fault, alignof(FaultBoard), "fault memory");
    control_ = normal::ControlLayout::make(num_ranks, max_experts, part.control_start);
    context_.names = part.names;
    context_.shape.num_ranks = num_ranks;
    context_.rank = rank;
    context_.knows_no_mask = true;
    context_.local = reinterpret_cast<uint8_t*>(local);
    context_.faults = reinterpret_cast<FaultBoard*>(fault);
    if (load_relaxed(&state_->budget_ns) == 0) set_time_budget(kDefaultBudgetNs);
}

void NormalRank::set_time_budget(uint64_t nanoseconds) {
    if (nanoseconds == 0) reject("the time budget must be at least 1 ns");
    store_relaxed(&state_->budget_ns, nanoseconds);
}

void NormalRank::reset() {
    std::memset(context_.heap[context_.rank], 0, static_cast<size_t>(control_.bytes));
    const uint64_t budget = load_relaxed(&state_->budget_ns);
    *state_ = State{};
    set_time_budget(budget);
}

uint8_t* NormalRank::notify_slot(int owner, uint64_t epoch, int source) const {
    const int64_t slot = static_cast<int64_t>(epoch & 1) * control_.num_ranks + source;
    return context_.heap[owner] + control_.notify_offset + slot * control_.notify_stride;
}

Credit* NormalRank::credit(int64_t offset, int owner, int source) const {
    return reinterpret_cast<Credit*>(context_.heap[owner] + offset + source * normal::kLine);
}

uint64_t* NormalRank::done(int owner, int source) const {
    return reinterpret_cast<uint64_t*>(context_.heap[owner] + control_.done_offset +
                                       source * normal::kLine);
}

uint64_t* NormalRank::chunks(int owner, int source) const {
    return reinterpret_cast<uint64_t*>(context_.heap[owner] + control_.chunk_offset) +
           source * normal::kNumChunks;
}

// Also says that nothing of the epochs before is read there any more.
void NormalRank::publish_credit(int64_t offset, const Credit& mine) const {
    for (int r = 0; r < control_.num_ranks; ++r) {
        Credit* line = credit(offset, r, context_.rank);
        line->offset = mine.offset;
        line->rows = mine.rows;
        line->terms = mine.terms;
        store_release(&line->epoch, mine.epoch);  // acquired by that rank's Waiter::wait
    }
}

// A peer's offset: never beyond the heap that we write to, and laid out as it expects.
bool NormalRank::fits(const Credit& granted, int64_t bytes, uint64_t terms, Where where,
                      int owner) const {
    if (granted.terms != 0 && granted.terms != terms) {
        fail(context_, where, FaultCode::kTerms, owner, terms, granted.terms);
        return false;
    }
    if (granted.offset >= 0 && granted.offset <= data_bytes_ &&
        bytes <= data_bytes_ - granted.offset) {
        return true;
    }
    fail(context_, where, FaultCode::kCount, owner, static_cast<uint64_t>(data_bytes_),
         static_cast<uint64_t>(granted.offset + bytes));
    return false;
}

void NormalRank::require_block(int64_t offset, int64_t bytes, const char* what) const {
    if (offset < 0 || offset % normal::kLine != 0 || offset > data_bytes_ - bytes) {
        reject(std::string(what) + " of " + std::to_string(bytes) + " bytes at " +
               std::to_string(offset) + " is not in the data heap of " +
               std::to_string(data_bytes_) + " bytes, or not 128-byte aligned");
    }
}

}  // namespace ep::host

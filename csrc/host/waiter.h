// Bounded waits for tags.
#pragma once

#include <cstdint>

#include "host/faults.h"

namespace ep::host {

// One operation's waits. They share one deadline, which starts when the first of them has to block:
// all peers work at the same time, so each of them had the whole budget.
class Waiter {
  public:
    Waiter(const Context& context, Where where, uint64_t epoch)
        : context_(context), where_(where), epoch_(epoch) {}

    // Returns once `tag` holds the epoch: what `peer` wrote before it is visible. False: the wait
    // failed, the fault is recorded, and the operation must return.
    bool wait(const uint64_t* tag, int peer);

    // Nanoseconds spent blocked since the last call.
    uint64_t take_blocked_ns();

  private:
    enum class Tag { kPast, kNow, kFuture };
    Tag look(const uint64_t* tag, int peer);
    bool block(const uint64_t* tag, int peer);

    const Context& context_;
    Where where_;
    uint64_t epoch_;
    uint64_t deadline_ns_ = 0;
    uint64_t blocked_ns_ = 0;
};

}  // namespace ep::host

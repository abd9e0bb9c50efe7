#include "host/waiter.h"

#include <sched.h>
#include <time.h>

#include <limits>

#include "host/atomics.h"

namespace ep::host {
namespace {

constexpr int kSpins = 2000;         // polls before the core is offered to others
constexpr int kSpinsPerCheck = 100;  // polls between looks at the abort word
constexpr int kYields = 2000;        // polls with sched_yield before sleeping
constexpr long kSleepNs = 50'000;

uint64_t now_ns() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
}

uint64_t saturating_add(uint64_t a, uint64_t b) {
    return a > std::numeric_limits<uint64_t>::max() - b ? std::numeric_limits<uint64_t>::max()
                                                        : a + b;
}

void relax_core() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield" ::: "memory");
#endif
}

void give_way(int polls) {
    if (polls < kSpins) {
        relax_core();
    } else if (polls < kSpins + kYields) {
        sched_yield();
    } else {
        const timespec pause{0, kSleepNs};
        nanosleep(&pause, nullptr);
    }
}

}  // namespace

bool Waiter::wait(const uint64_t* tag, int peer) {
    switch (look(tag, peer)) {
        case Tag::kNow:
            return true;
        case Tag::kFuture:
            return false;
        case Tag::kPast:
            break;
    }
    const uint64_t start = now_ns();
    if (deadline_ns_ == 0) {
        deadline_ns_ = saturating_add(start, load_relaxed(context_.budget_ns()));
    }
    const bool arrived = block(tag, peer);
    blocked_ns_ += now_ns() - start;
    return arrived;
}

uint64_t Waiter::take_blocked_ns() {
    const uint64_t ns = blocked_ns_;
    blocked_ns_ = 0;
    return ns;
}

Waiter::Tag Waiter::look(const uint64_t* tag, int peer) {
    const uint64_t seen = load_acquire(tag);
    if (seen == epoch_) return Tag::kNow;
    if (seen < epoch_) return Tag::kPast;
    fail(context_, where_, FaultCode::kDesync, peer, epoch_, seen);
    return Tag::kFuture;
}

bool Waiter::block(const uint64_t* tag, int peer) {
    for (int polls = 0;; polls = polls < kSpins + kYields ? polls + 1 : polls) {
        const Tag state = look(tag, peer);
        if (state != Tag::kPast) return state == Tag::kNow;
        if (polls >= kSpins || polls % kSpinsPerCheck == 0) {
            if (!may_run(context_, where_)) return false;
            if (now_ns() > deadline_ns_) {
                fail(context_, where_, FaultCode::kTimeout, peer, epoch_, load_relaxed(tag));
                return false;
            }
        }
        give_way(polls);
    }
}

}  // namespace ep::host

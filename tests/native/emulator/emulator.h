// Runs device code on the CPU: every CUDA thread is a fibre, all of one OS thread.
//
// A warp takes turns as a whole: its lanes run one after the other up to the next collective
// (shuffle, vote, barrier), so that loads and stores of one warp instruction lie in one turn, as a
// line does on the device. The order of the warps is drawn anew in every round. Nothing runs in
// parallel: this tests what the steps do and that they end, not memory order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__

struct Dim {
    unsigned x;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

namespace emulator {

inline constexpr int kWarp = 32;
inline constexpr size_t kStackBytes = 64 << 10;

// One collective: lanes bring values, and go on when all of `mask` (or the whole CTA) have come.
struct Meeting {
    unsigned mask = 0;
    unsigned arrived = 0;
    int count = 0;  // CTA barriers
    bool done = false;
    bool any = false;
    uint64_t values[kWarp] = {};
};

struct Cta;
struct Lane {
    ucontext_t context{};  // its beginning
    jmp_buf where;  // it stopped
    bool begun = false;
    std::unique_ptr<uint8_t[]> stack;
    Dim thread{}, block{}, grid{};
    Cta* cta = nullptr;
    std::shared_ptr<Meeting> waits_for;
    bool finished = false;
};

struct Warp {
    Lane lanes[kWarp];
    std::vector<std::shared_ptr<Meeting>> open;
};

struct Cta {
    std::vector<uint8_t> shared;
    std::function<void(uint8_t*)> body;
    std::shared_ptr<Meeting> barrier;
    std::vector<std::unique_ptr<Warp>> warps;
    int running = 0;
    int arrivals = 0;  // at the barrier that most warps do not wait for
    std::map<int, std::shared_ptr<Meeting>> parts;  // barriers of some warps, by number
};

inline Lane* current = nullptr;
inline Warp* current_warp = nullptr;
inline jmp_buf scheduler;

// swapcontext() would ask the kernel for the mask of signals, every time.
inline void pause() {
    if (_setjmp(current->where) == 0) _longjmp(scheduler, 1);
}

// Lets a lane run until it pauses.
[[gnu::noinline]] inline void resume(Warp& warp, Lane& lane) {
    current = &lane;
    current_warp = &warp;
    if (_setjmp(scheduler) != 0) return;
    if (lane.begun) _longjmp(lane.where, 1);
    lane.begun = true;
    setcontext(&lane.context);
}

inline int lane_id() { return static_cast<int>(current->thread.x % kWarp); }

// Meets the other lanes of the mask; everybody pauses, so that all of them go on in one turn.
inline std::shared_ptr<Meeting> meet(unsigned mask, uint64_t value) {
    const unsigned bit = 1u << lane_id();
    std::shared_ptr<Meeting> found;
    for (const auto& meeting : current_warp->open) {
        if (meeting->mask == mask && (meeting->arrived & bit) == 0) found = meeting;
    }
    if (!found) {
        found = std::make_shared<Meeting>();
        found->mask = mask;
        current_warp->open.push_back(found);
    }
    found->arrived |= bit;
    found->values[lane_id()] = value;
    if (found->arrived == mask) {
        found->done = true;
        std::erase(current_warp->open, found);
    }
    current->waits_for = found;
    pause();
    return found;
}

inline bool meet_cta(bool vote) {
    Cta& cta = *current->cta;
    if (!cta.barrier) cta.barrier = std::make_shared<Meeting>();
    const std::shared_ptr<Meeting> meeting = cta.barrier;
    meeting->any |= vote;
    if (++meeting->count == cta.running) {
        meeting->done = true;
        cta.barrier.reset();
    }
    current->waits_for = meeting;
    pause();
    return meeting->any;
}

// Barrier `id`, for `count` threads of the CTA.
inline void meet_some(int id, int count) {
    std::shared_ptr<Meeting>& part = current->cta->parts[id];
    if (!part) part = std::make_shared<Meeting>();
    const std::shared_ptr<Meeting> meeting = part;
    if (++meeting->count == count) {
        meeting->done = true;
        part.reset();
    }
    current->waits_for = meeting;
    pause();
}

inline void enter() {
    current->cta->body(current->cta->shared.data());
    current->finished = true;
    --current->cta->running;
    pause();
}

// A kernel: `grid` CTAs of `threads` threads. The body gets the CTA's shared memory.
struct Launch {
    int grid;
    int threads;
    int64_t shared_bytes;
    std::function<void(uint8_t*)> body;
};

inline void make_ready(Lane& lane) {
    lane.stack = std::make_unique_for_overwrite<uint8_t[]>(kStackBytes);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStackBytes;
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, enter, 0);
}

inline std::unique_ptr<Cta> make_cta(const Launch& launch, int block) {
    auto cta = std::make_unique<Cta>();
    cta->shared.assign(launch.shared_bytes + 16, 0xcd);  // whatever was there
    cta->body = launch.body;
    cta->running = launch.threads;
    for (int t = 0; t < launch.threads; ++t) {
        if (t % kWarp == 0) cta->warps.push_back(std::make_unique<Warp>());
        Lane& lane = cta->warps.back()->lanes[t % kWarp];
        lane.thread = {static_cast<unsigned>(t)};
        lane.block = {static_cast<unsigned>(block)};
        lane.grid = {static_cast<unsigned>(launch.grid)};
        lane.cta = cta.get();
        make_ready(lane);
    }
    return cta;
}

// One turn of a warp: true if any lane ran.
inline bool take_turn(Warp& warp) {
    bool ran = false;
    bool ready[kWarp];
    for (int i = 0; i < kWarp; ++i) {
        const Lane& lane = warp.lanes[i];
        ready[i] = lane.cta && !lane.finished && (!lane.waits_for || lane.waits_for->done);
    }
    for (int i = 0; i < kWarp; ++i) {
        if (!ready[i]) continue;
        ran = true;
        warp.lanes[i].waits_for.reset();
        resume(warp, warp.lanes[i]);
    }
    return ran;
}

// Runs all launches at once, as kernels of different GPUs do, to their ends.
inline void run(const std::vector<Launch>& launches, std::mt19937& random) {
    std::vector<std::unique_ptr<Cta>> ctas;
    std::vector<Warp*> warps;
    for (const Launch& launch : launches) {
        for (int b = 0; b < launch.grid; ++b) {
            ctas.push_back(make_cta(launch, b));
            for (const auto& warp : ctas.back()->warps) warps.push_back(warp.get());
        }
    }
    while (true) {
        std::shuffle(warps.begin(), warps.end(), random);
        bool ran = false;
        for (Warp* warp : warps) ran |= take_turn(*warp);
        if (ran) continue;
        for (const auto& cta : ctas) {
            if (cta->running == 0) continue;
            std::fprintf(stderr, "%d threads of a CTA wait for each other for ever\n",
                         cta->running);
            std::_Exit(2);
        }
        return;
    }
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define gridDim (emulator::current->grid)

inline void __syncthreads() { emulator::meet_cta(false); }
inline int __syncthreads_or(int vote) { return emulator::meet_cta(vote != 0); }
inline void __syncwarp() { emulator::meet(0xffffffffu, 0); }
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

template <class T>
uint64_t to_word(T value) {
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}
template <class T>
T from_word(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

template <class T>
T shuffle_from(unsigned mask, T value, int source) {
    const auto meeting = emulator::meet(mask, to_word(value));
    return from_word<T>(meeting->values[source & 31]);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    return shuffle_from(mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return shuffle_from(mask, value, emulator::lane_id() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
    const int source = emulator::lane_id() - delta;
    return shuffle_from(mask, value, source < 0 ? emulator::lane_id() : source);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const auto meeting = emulator::meet(mask, vote);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= (meeting->values[i] != 0 ? 1u : 0u) << i;
    return votes & mask;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __reduce_max_sync(unsigned mask, int value) {
    const auto meeting = emulator::meet(mask, to_word(value));
    int most = value;
    for (const uint64_t word : meeting->values) most = std::max(most, from_word<int>(word));
    return most;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    const auto meeting = emulator::meet(mask, value);
    unsigned bits = 0;
    for (const uint64_t word : meeting->values) bits |= static_cast<unsigned>(word);
    return bits;
}
inline int __reduce_add_sync(unsigned mask, int value) {
    const auto meeting = emulator::meet(mask, to_word(value));
    int sum = 0;
    for (const uint64_t word : meeting->values) sum += from_word<int>(word);
    return sum;
}

template <class T, class U>
T atomicAdd(T* at, U value) {
    const T old = *at;
    *at += value;
    return old;
}
template <class T, class U>
T atomicExch(T* at, U value) {
    const T old = *at;
    *at = value;
    return old;
}
template <class T>
T atomicOr(T* at, T value) {
    const T old = *at;
    *at |= value;
    return old;
}
template <class T>
T atomicMax(T* at, T value) {
    const T old = *at;
    *at = std::max(old, value);
    return old;
}
inline unsigned long long atomicCAS_system(unsigned long long* at, unsigned long long expected,
                                           unsigned long long value) {
    const unsigned long long old = *at;
    if (old == expected) *at = value;
    return old;
}

inline int __ffs(unsigned word) { return __builtin_ffs(static_cast<int>(word)); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline uint32_t max(uint32_t a, uint32_t b) { return std::max(a, b); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    return max(a >> 16, b >> 16) << 16 | max(a & 0xffffu, b & 0xffffu);
}
inline uint32_t __vminu2(uint32_t a, uint32_t b) {
    return std::min(a >> 16, b >> 16) << 16 | std::min(a & 0xffffu, b & 0xffffu);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        out |= (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return out;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Stands before csrc/cuda/ptx.cuh on the include path: its functions, without PTX.
#pragma once

#include <deque>
#include <map>

#include "emulator/emulator.h"
#include "ep/fp8.h"

namespace ep::ptx {

struct alignas(16) Vector {
    uint64_t lo;
    uint64_t hi;
};

inline void store_line_vector(void* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
inline Vector load_line_vector(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline Vector load_vector_now(const void* p) { return load_line_vector(p); }
inline Vector load_vector_once(const void* p) { return load_line_vector(p); }
inline uint64_t load_relaxed_sys(const uint64_t* p) { return *p; }
inline void store_relaxed_sys(uint64_t* p, uint64_t v) { *p = v; }
inline uint32_t pack_bf16x2(float lo, float hi) {
    return float_to_bf16(lo) | static_cast<uint32_t>(float_to_bf16(hi)) << 16;
}
inline float reciprocal(float x) { return 1.0f / x; }
struct Two {
    float lo;
    float hi;
};
inline Two unpack_fp8x2(uint16_t values) {
    return {fp8_to_float(static_cast<uint8_t>(values)),
            fp8_to_float(static_cast<uint8_t>(values >> 8))};
}
inline uint64_t global_timer_ns() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline uint64_t load_acquire_sys(const uint64_t* p) { return *p; }
inline void store_release_sys(uint64_t* p, uint64_t v) { *p = v; }
inline void store_release_sys(int32_t* p, int32_t v) { *p = v; }
inline void pause() { emulator::pause(); }
inline void fence_release_sys() {}
inline uint32_t load_acquire_cta(const uint32_t* p) { return *p; }
inline void store_release_cta(uint32_t* p, uint32_t v) { *p = v; }
inline void add_release_sys(uint64_t* p, uint64_t v) { *p += v; }
inline uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }

// Bulk loads are there at once, and arrive. Bulk stores are made as late as the kernel allows, so
// that a stage that is filled again too early gives wrong bytes.
struct BulkStore {
    void* to;
    const void* from;
    uint32_t bytes;
};
struct BulkStores {
    std::vector<BulkStore> open;
    std::deque<std::vector<BulkStore>> committed;
};
inline std::map<const emulator::Lane*, BulkStores> bulk_stores;

inline void fence_async() {}
inline void fence_async_shared() {}
// A word that counts arrivals: phases | arrivals that are missing << 32 | those of a phase << 48.
inline void init_arrivals(uint64_t* barrier, uint32_t expected) {
    *barrier = static_cast<uint64_t>(expected) << 48 | static_cast<uint64_t>(expected) << 32;
}
inline void arrive(uint64_t* barrier) {
    constexpr uint64_t kMissing = uint64_t{0xffff} << 32;
    if ((*barrier & kMissing) == 0) std::abort();
    *barrier -= uint64_t{1} << 32;
    if ((*barrier & kMissing) == 0) *barrier += 1 + (*barrier >> 48 << 32);
}
inline void start_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
    std::memcpy(to, from, bytes);
    arrive(barrier);
}
inline void await_phase(uint64_t* barrier, uint32_t parity) {
    while ((*barrier & 1) == parity) emulator::pause();
}
inline void start_store(void* to, const void* from, uint32_t bytes) {
    if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0) std::abort();
    bulk_stores[emulator::current].open.push_back({to, from, bytes});
}
inline void commit_stores() {
    BulkStores& mine = bulk_stores[emulator::current];
    mine.committed.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int kLeft>
void await_stores() {
    auto& committed = bulk_stores[emulator::current].committed;
    while (committed.size() > kLeft) {
        for (const BulkStore& s : committed.front()) std::memcpy(s.to, s.from, s.bytes);
        committed.pop_front();
    }
}
template <int kLeft>
void await_stores_read() {
    await_stores<kLeft>();
}
// Copies of one thread, made as late as it allows too.
inline std::map<const emulator::Lane*, BulkStores> copies;
inline void start_copies(void* to, const void* from, int left) {
    if (left > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
    for (int u = 0; u < 4 && 32 * u < left; ++u) {
        copies[emulator::current].open.push_back(
            {static_cast<uint8_t*>(to) + 512 * u, static_cast<const uint8_t*>(from) + 512 * u, 16});
    }
}
inline void start_four_copies(void* to, const void* from) { start_copies(to, from, 128); }
inline void start_packed_copies(void* to, const void* from, const void* last) {
    start_copies(to, from, 96);
    copies[emulator::current].open.push_back({static_cast<uint8_t*>(to) + 1536, last, 16});
}
inline void commit_copies() {
    BulkStores& mine = copies[emulator::current];
    mine.committed.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int kLeft>
void await_copies() {
    auto& committed = copies[emulator::current].committed;
    while (committed.size() > kLeft) {
        for (const BulkStore& c : committed.front()) std::memcpy(c.to, c.from, c.bytes);
        committed.pop_front();
    }
}
inline void keep(int32_t) {}
template <int kId, int kCount>
void sync_some() {
    emulator::meet_some(kId, kCount);
}
template <int kThreads>
void arrive_with(uint64_t) {
    ++emulator::current->cta->arrivals;
}
template <int kThreads>
void await_arrivals() {
    ++emulator::current->cta->arrivals;
    while (emulator::current->cta->arrivals < kThreads) emulator::pause();
}
inline void count_if(bool counts, int32_t* counter) {
    if (counts) ++*counter;
}
inline void allow_next_kernel() {}
inline void await_previous_kernel() {}

}  // namespace ep::ptx

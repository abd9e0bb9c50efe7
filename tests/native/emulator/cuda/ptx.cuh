// Stands before csrc/cuda/ptx.cuh on the include path: its functions, without PTX.
#pragma once

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
inline uint64_t load_relaxed_sys(const uint64_t* p) { return *p; }
inline uint32_t pack_bf16x2(float lo, float hi) {
    return float_to_bf16(lo) | static_cast<uint32_t>(float_to_bf16(hi)) << 16;
}
inline uint64_t global_timer_ns() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline void keep(int32_t) {}
template <int kThreads>
void arrive_with(uint64_t) {
    ++emulator::current->cta->arrivals;
}
template <int kThreads>
void await_arrivals() {
    ++emulator::current->cta->arrivals;
    while (emulator::current->cta->arrivals < kThreads) emulator::pause();
}
inline void allow_next_kernel() {}
inline void await_previous_kernel() {}

}  // namespace ep::ptx

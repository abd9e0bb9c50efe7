// Every PTX instruction of the project. A function's name states its order and scope.
#pragma once

#include <cstdint>

namespace ep::ptx {

// Half a granule pair of a line: 16 bytes that one lane moves.
struct alignas(16) Vector {
    uint64_t lo;
    uint64_t hi;
};

// Lines: eight lanes of one warp instruction store, and load, one aligned 128-byte line. L2 and
// NVLink keep such a line whole, so a reader that sees the tag in its last 8 bytes sees all of it.
// The store is therefore its own release, and the load that finds the tag its own acquire, for that
// line only.
__device__ __forceinline__ void store_line_vector(void* p, Vector v) {
    asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"(v.lo), "l"(v.hi)
                 : "memory");
}
__device__ __forceinline__ Vector load_line_vector(const void* p) {
    Vector v;
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(v.lo), "=l"(v.hi)
                 : "l"(p)
                 : "memory");
    return v;
}

// Abort words: advisory, order does not matter.
__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
// Two floats to BF16, nearest even; `lo` in the low half.
__device__ __forceinline__ uint32_t pack_bf16x2(float lo, float hi) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}

// Nanoseconds, the same clock for all SMs of a GPU.
__device__ __forceinline__ uint64_t global_timer_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// Keeps a load whose value nobody needs: the assembler cannot know that the sleep never comes.
__device__ __forceinline__ void keep(int32_t value) {
    if (value == 0x7fc0de99) __nanosleep(1);
}

// Programmatic dependent launch; both are no-ops in a kernel launched without it.
__device__ __forceinline__ void allow_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void await_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace ep::ptx

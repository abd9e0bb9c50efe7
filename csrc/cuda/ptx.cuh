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

// A load that stays where it is written: an ordinary one the assembler moves behind a branch, to
// where its value is used.
__device__ __forceinline__ Vector load_vector_now(const void* p) {
    Vector v;
    asm volatile("ld.relaxed.cta.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.lo), "=l"(v.hi) : "l"(p));
    return v;
}

// A load of what nobody will want again: the cache may give it up before anything else.
__device__ __forceinline__ Vector load_vector_once(const void* p) {
    Vector v;
    asm volatile("ld.global.cs.v2.u64 {%0, %1}, [%2];" : "=l"(v.lo), "=l"(v.hi) : "l"(p));
    return v;
}

// Words of 8 bytes that carry their own tag, which no access tears; and abort words, which are
// advisory. Nothing else is inferred from either, so order does not matter.
__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void store_relaxed_sys(uint64_t* p, uint64_t v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// Words that say that something else is there: what was written before the release is visible after
// the acquire that finds its value, on any GPU and on the host.
__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_release_sys(uint64_t* p, uint64_t v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void store_release_sys(int32_t* p, int32_t v) {
    asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// What was written before the fence, by whoever this thread has acquired from too, comes before
// what is stored after it: one fence for many words. It waits until all that the SM has stored so
// far has arrived. Those stores are store_relaxed_sys.
__device__ __forceinline__ void fence_release_sys() {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}
// Between warps of a CTA.
__device__ __forceinline__ uint32_t load_acquire_cta(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_release_cta(uint32_t* p, uint32_t v) {
    asm volatile("st.release.cta.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Whoever acquires the sum after this addition sees what was written before it.
__device__ __forceinline__ void add_release_sys(uint64_t* p, uint64_t v) {
    asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
// Each adder sees what earlier adders wrote before: release and acquire in one, for this GPU.
__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t v) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(p), "r"(v)
                 : "memory");
    return before;
}

// Bulk copies: the copy engine of the SM moves them, in what PTX calls the async proxy. All
// addresses and sizes are multiples of 16 bytes.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Between ordinary accesses to shared memory and bulk copies out of it,
__device__ __forceinline__ void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// or ordinary accesses to any memory and bulk copies that must not overtake them.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// A word in shared memory that counts arrivals, `expected` a phase, and a bulk load's bytes. It is
// there for others behind a barrier of the CTA.
__device__ __forceinline__ void init_arrivals(uint64_t* barrier, uint32_t expected) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(expected)
                 : "memory");
}
// One arrival: releases what the thread wrote to the CTA. Pairs with await_phase.
__device__ __forceinline__ void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
// Global to shared memory, and one arrival. Pairs with await_phase.
__device__ __forceinline__ void start_load(void* to, const void* from, uint32_t bytes,
                                           uint64_t* barrier) {
    const uint32_t b = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(b)
        : "memory");
}
// Waits until all of the phase with this parity have arrived, and acquires what they released or
// loaded. Within the SM: no peer may keep it from ending.
__device__ __forceinline__ void await_phase(uint64_t* barrier, uint32_t parity) {
    const uint32_t b = shared_address(barrier);
    uint32_t there = 0;
    while (there == 0) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(there)
            : "r"(b), "r"(parity)
            : "memory");
    }
}
// Shared to global memory, a peer's too. Stores belong to the thread's next commit_stores().
__device__ __forceinline__ void start_store(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void commit_stores() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// All but the thread's last `kLeft` groups have been read from shared memory,
template <int kLeft>
__device__ __forceinline__ void await_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}
// or have been written: a release after it covers them.
template <int kLeft>
__device__ __forceinline__ void await_stores() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Adds one to a counter in shared memory where `counts`: an atomic that nobody waits for, and no
// branch.
__device__ __forceinline__ void count_if(bool counts, int32_t* counter) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %1, 0;\n"
        "@p red.shared.add.u32 [%0], 1;\n"
        "}" ::"r"(shared_address(counter)),
        "r"(static_cast<uint32_t>(counts))
        : "memory");
}

// From global to shared memory, of this thread and for it alone: 16 bytes at both addresses, 512
// behind them and so on, four times where `left` is beyond 96, the u-th where it is beyond 32 * u.
// Part of the thread's next commit_copies(). One statement: left to the compiler, each copy has
// addresses of its own to compute.
__device__ __forceinline__ void start_copies(void* to, const void* from, int left) {
    asm volatile(
        "{\n"
        ".reg .pred p, q, r, s;\n"
        "setp.gt.s32 p, %2, 0;\n"
        "setp.gt.s32 q, %2, 32;\n"
        "setp.gt.s32 r, %2, 64;\n"
        "setp.gt.s32 s, %2, 96;\n"
        "@p cp.async.cg.shared.global [%0], [%1], 16;\n"
        "@q cp.async.cg.shared.global [%0 + 512], [%1 + 512], 16;\n"
        "@r cp.async.cg.shared.global [%0 + 1024], [%1 + 1024], 16;\n"
        "@s cp.async.cg.shared.global [%0 + 1536], [%1 + 1536], 16;\n"
        "}" ::"r"(shared_address(to)),
        "l"(from), "r"(left)
        : "memory");
}
// All four.
__device__ __forceinline__ void start_four_copies(void* to, const void* from) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;\n"
        "cp.async.cg.shared.global [%0 + 512], [%1 + 512], 16;\n"
        "cp.async.cg.shared.global [%0 + 1024], [%1 + 1024], 16;\n"
        "cp.async.cg.shared.global [%0 + 1536], [%1 + 1536], 16;\n" ::"r"(shared_address(to)),
        "l"(from)
        : "memory");
}
// Three, and in place of the fourth what is at `last`.
__device__ __forceinline__ void start_packed_copies(void* to, const void* from, const void* last) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;\n"
        "cp.async.cg.shared.global [%0 + 512], [%1 + 512], 16;\n"
        "cp.async.cg.shared.global [%0 + 1024], [%1 + 1024], 16;\n"
        "cp.async.cg.shared.global [%0 + 1536], [%2], 16;\n" ::"r"(shared_address(to)),
        "l"(from), "l"(last)
        : "memory");
}
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the thread's last `kLeft` groups are there.
template <int kLeft>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Two floats to BF16, nearest even; `lo` in the low half.
__device__ __forceinline__ uint32_t pack_bf16x2(float lo, float hi) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}

// To one unit in the last place; subnormal results are zero.
__device__ __forceinline__ float reciprocal(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// Two e4m3 values, exactly; `lo` is the low byte.
struct Two {
    float lo;
    float hi;
};
__device__ __forceinline__ Two unpack_fp8x2(uint16_t values) {
    Two out;
    asm("{\n"
        ".reg .b32 pair;\n"
        ".reg .b16 lo, hi;\n"
        "cvt.rn.f16x2.e4m3x2 pair, %2;\n"
        "mov.b32 {lo, hi}, pair;\n"
        "cvt.f32.f16 %0, lo;\n"
        "cvt.f32.f16 %1, hi;\n"
        "}"
        : "=f"(out.lo), "=f"(out.hi)
        : "h"(values));
    return out;
}

// Between two looks at a word that another warp of this CTA will write.
__device__ __forceinline__ void pause() { __nanosleep(20); }

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

// Barrier 1 of the CTA, for a step that one warp waits for and the others only report: they do not
// stop. `value` is there when they arrive.
template <int kThreads>
__device__ __forceinline__ void arrive_with(uint64_t value) {
    keep(static_cast<int32_t>(value));
    asm volatile("bar.arrive 1, %0;" ::"n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void await_arrivals() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Barrier `kId` of the CTA (0 is __syncthreads, 1 is above), for `kCount` of its threads in whole
// warps.
template <int kId, int kCount>
__device__ __forceinline__ void sync_some() {
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kCount) : "memory");
}

// Programmatic dependent launch; both are no-ops in a kernel launched without it.
__device__ __forceinline__ void allow_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void await_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace ep::ptx

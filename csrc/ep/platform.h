// Host and device see the same headers; this is the only place where they differ.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EP_HD __host__ __device__ __forceinline__
#else
#define EP_HD inline
#endif

namespace ep {

EP_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
EP_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Division by a number known at set-up, as a multiplication. Exact while n * divisor < 2^32.
struct FastDiv {
    uint32_t divisor;
    uint32_t magic;  // ceil(2^32 / divisor); unused for 1

    static FastDiv by(uint32_t divisor) {
        const uint64_t magic = ((1ull << 32) + divisor - 1) / divisor;
        return {divisor, static_cast<uint32_t>(magic)};
    }
    EP_HD int operator()(int n) const {
        if (divisor == 1) return n;
        return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic) >> 32);
    }
};

}  // namespace ep

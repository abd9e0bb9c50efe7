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

}  // namespace ep

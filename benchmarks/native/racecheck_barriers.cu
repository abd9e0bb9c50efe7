// Which barriers does compute-sanitizer's racecheck lose count of? (docs/benchmarks.md)
//
//   nvcc -std=c++20 -O3 -lineinfo -arch=sm_90 -o build/racecheck_barriers
//       benchmarks/native/racecheck_barriers.cu   (all on one line)
//   compute-sanitizer --tool racecheck build/racecheck_barriers KERNEL      (0 to 11)
//
// In every kernel a warp writes, the whole CTA meets, all read, and the whole CTA meets again
// before the next write. They differ in how it meets before the reads, and in how the warp that
// writes met others before: at a barrier with one warp, with all warps, with all but one, or by a
// word of shared memory that counts arrivals. None has a race; kernels 2 to 5 and 7 are reported
// (CUDA 13.0). Exit status 1 if the kernel failed or KERNEL is not one of them.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace {

// Whom warp 3 waits for, and how: warp 2, which arrives or waits too; all warps, which arrive; all
// but warp 2, which wait too; warp 2, by an mbarrier.
enum class Named { kNone, kArrive, kSync, kArriveAll, kSome, kWord };
enum class Meet { kSync, kOr };

__device__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Warps before their first turn; warp 3 when it is about to write.
template <Named kNamed>
__device__ void tell(int warp, int lane, unsigned long long* word) {
    if (kNamed == Named::kArrive && warp == 2) asm volatile("bar.arrive 3, 64;" ::: "memory");
    if (kNamed == Named::kSync && warp == 2) asm volatile("bar.sync 3, 64;" ::: "memory");
    if (kNamed == Named::kArriveAll && warp != 3) asm volatile("bar.arrive 1, 128;" ::: "memory");
    if (kNamed == Named::kSome && warp < 2) asm volatile("bar.sync 2, 96;" ::: "memory");
    if (kNamed == Named::kWord && warp == 2 && lane == 0) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(word))
                     : "memory");
    }
}
template <Named kNamed>
__device__ void hear(unsigned long long* word) {
    if (kNamed == Named::kArrive || kNamed == Named::kSync) {
        asm volatile("bar.sync 3, 64;" ::: "memory");
    }
    if (kNamed == Named::kArriveAll) asm volatile("bar.sync 1, 128;" ::: "memory");
    if (kNamed == Named::kSome) asm volatile("bar.sync 2, 96;" ::: "memory");
    unsigned there = kNamed == Named::kWord ? 0 : 1;
    while (there == 0) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(there)
            : "r"(shared_address(word))
            : "memory");
    }
}

template <Named kNamed, Meet kMeet>
__global__ void kernel(int* out, int turns, int gives_up_at) {
    __shared__ int places[32];
    __shared__ unsigned long long word;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (kNamed == Named::kWord) {
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&word))
                         : "memory");
        }
        __syncthreads();
    }
    tell<kNamed>(warp, lane, &word);
    int sum = 0;
    for (int turn = 0; turn < turns; ++turn) {
        if (warp == 3) {
            if (turn == 0) hear<kNamed>(&word);
            places[lane] = turn + lane;
        }
        if (kMeet == Meet::kSync) {
            __syncthreads();
        } else if (__syncthreads_or(turn == gives_up_at) != 0) {
            return;
        }
        if (warp < 2) sum += places[(lane + turn) % 32];
        __syncthreads();
    }
    out[threadIdx.x] = sum;
}

using Kernel = void (*)(int*, int, int);
constexpr struct {
    const char* what;
    Kernel run;
} kKernels[] = {
    {"__syncthreads", kernel<Named::kNone, Meet::kSync>},
    {"__syncthreads_or", kernel<Named::kNone, Meet::kOr>},
    {"bar.arrive and bar.sync, __syncthreads", kernel<Named::kArrive, Meet::kSync>},
    {"bar.arrive and bar.sync, __syncthreads_or", kernel<Named::kArrive, Meet::kOr>},
    {"bar.sync, __syncthreads", kernel<Named::kSync, Meet::kSync>},
    {"bar.sync, __syncthreads_or", kernel<Named::kSync, Meet::kOr>},
    {"bar.arrive of all, __syncthreads", kernel<Named::kArriveAll, Meet::kSync>},
    {"bar.arrive of all, __syncthreads_or", kernel<Named::kArriveAll, Meet::kOr>},
    {"bar.sync of three warps, __syncthreads", kernel<Named::kSome, Meet::kSync>},
    {"bar.sync of three warps, __syncthreads_or", kernel<Named::kSome, Meet::kOr>},
    {"mbarrier, __syncthreads", kernel<Named::kWord, Meet::kSync>},
    {"mbarrier, __syncthreads_or", kernel<Named::kWord, Meet::kOr>},
};

}  // namespace

int main(int argc, char** argv) {
    const int which = argc == 2 ? std::atoi(argv[1]) : -1;
    if (which < 0 || which >= static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0]))) return 1;
    int* out = nullptr;
    cudaError_t error = cudaMalloc(&out, 128 * sizeof(int));
    if (error == cudaSuccess) {
        kKernels[which].run<<<2, 128>>>(out, 5, -1);
        error = cudaDeviceSynchronize();
    }
    std::printf("%s: %s\n", kKernels[which].what, cudaGetErrorString(error));
    return error != cudaSuccess;
}

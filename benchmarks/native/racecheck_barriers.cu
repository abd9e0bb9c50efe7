// Which barriers does compute-sanitizer's racecheck lose count of? (docs/benchmarks.md)
//
//   nvcc -std=c++20 -O3 -lineinfo -arch=sm_90 -o build/racecheck_barriers
//       benchmarks/native/racecheck_barriers.cu   (all on one line)
//   compute-sanitizer --tool racecheck build/racecheck_barriers KERNEL      (0 to 5)
//
// In every kernel a warp writes, the whole CTA meets, all read, and the whole CTA meets again
// before the next write. They differ in how it meets before the reads, and in whether two warps met
// at a named barrier before. Exit status 1 if the kernel failed or KERNEL is not one of them.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace {

enum class Named { kNone, kArrive, kSync };  // how warp 2 tells warp 3
enum class Meet { kSync, kOr };

template <Named kNamed, Meet kMeet>
__global__ void kernel(int* out, int turns, int gives_up_at) {
    __shared__ int places[32];
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (warp == 2 && kNamed == Named::kArrive) asm volatile("bar.arrive 3, 64;" ::: "memory");
    if (warp == 2 && kNamed == Named::kSync) asm volatile("bar.sync 3, 64;" ::: "memory");
    int sum = 0;
    for (int turn = 0; turn < turns; ++turn) {
        if (warp == 3) {
            if (kNamed != Named::kNone && turn == 0) asm volatile("bar.sync 3, 64;" ::: "memory");
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

#include "cuda/masks.h"

#include "cuda/error.h"

namespace ep {
namespace {

cudaStream_t stream_of(StreamHandle stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Another chain's operations may run meanwhile, and other masks may be set: hence the atomics.
__global__ void set_mask_kernel(RankMask* mask, int rank, bool masked) {
    auto* word = reinterpret_cast<unsigned long long*>(&mask->words[rank >> 6]);
    if (masked) {
        atomicOr(word, static_cast<unsigned long long>(RankMask::bit(rank)));
    } else {
        atomicAnd(word, ~static_cast<unsigned long long>(RankMask::bit(rank)));
    }
}

__global__ void clear_mask_kernel(RankMask* mask) {
    atomicExch(reinterpret_cast<unsigned long long*>(&mask->words[threadIdx.x]), 0ull);
}

__global__ void write_mask_kernel(const RankMask* mask, int32_t* out, int num_ranks) {
    const int r = static_cast<int>(threadIdx.x);
    if (r < num_ranks) out[r] = mask->has(r) ? 1 : 0;
}

}  // namespace

void launch_set_mask(RankMask* mask, int rank, bool masked, StreamHandle stream) {
    set_mask_kernel<<<1, 1, 0, stream_of(stream)>>>(mask, rank, masked);
    EP_CUDA(cudaGetLastError());
}

void launch_clear_mask(RankMask* mask, StreamHandle stream) {
    clear_mask_kernel<<<1, RankMask::kWords, 0, stream_of(stream)>>>(mask);
    EP_CUDA(cudaGetLastError());
}

void launch_write_mask(const RankMask* mask, int32_t* out, int num_ranks, StreamHandle stream) {
    write_mask_kernel<<<1, 96, 0, stream_of(stream)>>>(mask, out, num_ranks);
    EP_CUDA(cudaGetLastError());
}

static_assert(kMaxRanks <= 96);  // a thread for each

}  // namespace ep

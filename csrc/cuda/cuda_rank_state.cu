// What of a rank outlives its operations: time budget, mask, statistics, and starting afresh.
#include <stdexcept>
#include <string>

#include "cuda/cuda_rank.h"
#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/masks.h"

namespace ep {
namespace {

// When all that was launched has ended.
template <class T>
T read_settled(const T* from) {
    T value{};
    EP_CUDA(cudaDeviceSynchronize());
    EP_CUDA(cudaMemcpy(&value, from, sizeof(value), cudaMemcpyDeviceToHost));
    return value;
}

}  // namespace

void CudaRank::set_time_budget(uint64_t nanoseconds) const {
    const DeviceGuard guard(options_.device);
    EP_CUDA(cudaMemcpy(ctx_.local + LocalLayout::kBudgetOffset, &nanoseconds, sizeof(nanoseconds),
                       cudaMemcpyHostToDevice));
}

void CudaRank::set_rank_mask(int rank, bool masked, StreamHandle stream) const {
    if (rank < 0 || rank >= ctx_.shape.num_ranks) {
        throw std::invalid_argument("rank " + std::to_string(rank) + " is not in 0.." +
                                    std::to_string(ctx_.shape.num_ranks - 1));
    }
    const DeviceGuard guard(options_.device);
    launch_set_mask(ctx_.mask(), rank, masked, stream);
}

void CudaRank::clear_rank_mask(StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    launch_clear_mask(ctx_.mask(), stream);
}

void CudaRank::write_rank_mask(std::uintptr_t out, StreamHandle stream) const {
    const DeviceGuard guard(options_.device);
    launch_write_mask(ctx_.mask(), reinterpret_cast<int32_t*>(out), ctx_.shape.num_ranks, stream);
}

RankMask CudaRank::read_rank_mask() const {
    const DeviceGuard guard(options_.device);
    return read_settled(ctx_.mask());
}

StepStats CudaRank::read_stats(int chain) const {
    const DeviceGuard guard(options_.device);
    return read_settled(ctx_.stats(chain));
}

ChainState CudaRank::read_state(int chain) const {
    const DeviceGuard guard(options_.device);
    return read_settled(ctx_.state(chain));
}

void CudaRank::reset() const {
    const DeviceGuard guard(options_.device);
    EP_CUDA(cudaDeviceSynchronize());
    EP_CUDA(cudaMemset(ctx_.heap[ctx_.rank], 0, static_cast<size_t>(ctx_.layout.bytes)));
    EP_CUDA(cudaMemset(ctx_.local + LocalLayout::kClaimOffset, 0,
                       static_cast<size_t>(ctx_.local_layout.bytes - LocalLayout::kClaimOffset)));
    EP_CUDA(cudaDeviceSynchronize());
}

}  // namespace ep

#include "nvshmem_puts.h"

#include <nvshmem.h>
#include <nvshmemx.h>

#include <algorithm>
#include <cstring>

#include "cuda/wire_puts.cuh"

namespace ep {
namespace wire {
namespace {

// The region is symmetric: an address here stands for the same place at any rank.
struct NvshmemPuts {
    uint8_t* mine;

    __device__ __forceinline__ uint64_t* signal(const Put& put) const {
        return reinterpret_cast<uint64_t*>(mine + put.signal);
    }
    __device__ __forceinline__ void warp(int rank, const Put& put, uint64_t epoch) const {
        if (put.bytes == 0) return tell(rank, put, epoch, (threadIdx.x & 31) == 0);
        nvshmemx_putmem_signal_nbi_warp(mine + put.to, mine + put.from,
                                        static_cast<size_t>(put.bytes), signal(put), epoch,
                                        NVSHMEM_SIGNAL_SET, rank);
    }
    __device__ __forceinline__ void block(int rank, const Put& put, uint64_t epoch) const {
        if (put.bytes == 0) return tell(rank, put, epoch, threadIdx.x == 0);
        nvshmemx_putmem_signal_nbi_block(mine + put.to, mine + put.from,
                                         static_cast<size_t>(put.bytes), signal(put), epoch,
                                         NVSHMEM_SIGNAL_SET, rank);
    }
    __device__ __forceinline__ void finish() const {
        __syncthreads();
        if (threadIdx.x == 0) nvshmem_quiet();
    }

  private:
    __device__ __forceinline__ void tell(int rank, const Put& put, uint64_t epoch,
                                         bool once) const {
        if (once) nvshmemx_signal_op(signal(put), epoch, NVSHMEM_SIGNAL_SET, rank);
    }
};

__global__ void __launch_bounds__(kPutThreads)
    nvshmem_announce_kernel(const __grid_constant__ AnnounceArgs a) {
    announce(a, NvshmemPuts{a.mine});
}
__global__ void __launch_bounds__(kPutThreads)
    nvshmem_put_kernel(const __grid_constant__ PutArgs a) {
    put_rows(a, NvshmemPuts{a.mine});
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), int64_t grid, uintptr_t stream, const Args& args) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(1, grid)));
    config.blockDim = dim3(kPutThreads);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, args);
}

template <class Args>
cudaError_t load(void (*kernel)(Args)) {
    cudaFuncAttributes loaded{};
    return cudaFuncGetAttributes(&loaded, reinterpret_cast<const void*>(kernel));
}

}  // namespace
}  // namespace wire

int nvshmem_announce(const wire::Region& region, const wire::Message& message, uintptr_t mine,
                     uintptr_t counters, uintptr_t abort, uintptr_t stream) {
    const wire::Place& p = region.place;
    return wire::launch(wire::nvshmem_announce_kernel, 1, stream,
                        wire::AnnounceArgs{region, message, p.rank_of(p.node, p.local),
                                           reinterpret_cast<uint8_t*>(mine),
                                           reinterpret_cast<const wire::Counters*>(counters),
                                           reinterpret_cast<const uint64_t*>(abort)});
}

int nvshmem_put(const wire::Region& region, const wire::Transfer& transfer, uintptr_t mine,
                uintptr_t counters, uintptr_t abort, int num_sms, uintptr_t stream) {
    const int64_t items = (region.place.num_nodes - 1) * wire::kChannels;
    return wire::launch(wire::nvshmem_put_kernel, std::min<int64_t>(num_sms, items), stream,
                        wire::PutArgs{region, transfer, reinterpret_cast<uint8_t*>(mine),
                                      reinterpret_cast<const wire::Counters*>(counters),
                                      reinterpret_cast<const uint64_t*>(abort)});
}

int nvshmem_attach(int rank, int num_ranks, const void* unique_id) {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    std::memcpy(&id, unique_id, sizeof(id));
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    int status = nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &id, &attributes);
    if (status != 0) return status;
    // As nvshmemx_init_attr() does, which would end the process where this returns a status. The
    // world runs already: what is new is this module's copy of the device state.
    const nvshmemi_version_t version = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                                        NVSHMEM_VENDOR_PATCH_VERSION};
    int provided = 0;
    status = nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID,
                                  &attributes, version);
    if (status != 0) return status;
    for (const cudaError_t error :
         {wire::load(wire::nvshmem_announce_kernel), wire::load(wire::nvshmem_put_kernel)}) {
        if (error != cudaSuccess) return -static_cast<int>(error);
    }
    return 0;
}

}  // namespace ep

// Puts by NVSHMEM's device code: kernels of a translation unit of its own, since they are linked
// with NVSHMEM's (relocatable device code).
#pragma once

#include <cstdint>

#include "ep/wire.h"

namespace ep {

// Each launches one kernel on `stream` of the current device, and returns CUDA's error code.
int nvshmem_announce(const wire::Region& region, const wire::Message& message, uintptr_t mine,
                     uintptr_t counters, uintptr_t abort, uintptr_t stream);
int nvshmem_put(const wire::Region& region, const wire::Transfer& transfer, uintptr_t mine,
                uintptr_t counters, uintptr_t abort, int num_sms, uintptr_t stream);

// Lets this module's kernels use the world that the host library has started; loads them. Returns
// NVSHMEM's status, or CUDA's error negated.
int nvshmem_attach(int rank, int num_ranks, const void* unique_id);

}  // namespace ep

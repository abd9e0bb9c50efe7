// Changing and telling the mask in stream order: kernels of their own, so that graphs may hold
// them.
#pragma once

#include "cuda/cuda_rank.h"

namespace ep {

// Launch contract of both: `mask` is this rank's RankMask. Errors are CudaFailure.
void launch_set_mask(RankMask* mask, int rank, bool masked, StreamHandle stream);
void launch_clear_mask(RankMask* mask, StreamHandle stream);
// 1 for each masked rank, else 0.
void launch_write_mask(const RankMask* mask, int32_t* out, int num_ranks, StreamHandle stream);

}  // namespace ep

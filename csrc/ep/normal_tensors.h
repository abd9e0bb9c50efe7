// The tensors of normal operations, by address: the same for CPU and GPU ranks.
#pragma once

#include "ep/normal.h"

namespace ep {

// Where this rank's tokens go: int32 [R], int32 [E], bool [T, R].
struct NormalLayout {
    int32_t* tokens_per_rank;
    int32_t* tokens_per_expert;
    uint8_t* is_token_in_rank;
};

// topk_idx [T, K] of 4 or 8 bytes an entry, and weights [T, K]; K 0: nothing of it is sent.
struct NormalRoutes {
    const void* topk_idx;  // nullptr with K > 0: weights go alone, unmasked
    int32_t idx_bytes;
    const float* weights;
    int32_t topk;

    EP_HD int64_t expert(int64_t entry) const {
        return idx_bytes == 4 ? static_cast<const int32_t*>(topk_idx)[entry]
                              : static_cast<const int64_t*>(topk_idx)[entry];
    }
};

// Rows to send. Strides of scales in 4-byte words.
struct NormalRows {
    const uint8_t* x;
    int64_t stride_bytes;
    int64_t row_bytes;
    const uint32_t* scales;
    int64_t scale_stride_token;
    int64_t scale_stride_group;
    int32_t num_scales;
    int32_t num_tokens;
    const int32_t* source_token =
        nullptr;  // [T] what a row is called at its destination; nullptr: its index
};

// What notify made: int32 [R, R] and int32 [T, R].
struct NormalTables {
    int32_t* rank_prefix;
    int32_t* send_position;
};

struct NormalCombine {
    const uint8_t* x;  // BF16 rows as received
    int64_t stride_bytes;
    int32_t hidden;
    const float* topk_weights;  // [N, K], or nullptr
    int32_t topk;
    const uint16_t* bias[2];
    int32_t num_tokens;
    int64_t inbox_offset;
    uint16_t* out;
    float* out_weights;  // [T, K], or nullptr: no weights come home
    // [N] the rows of x, and of topk_weights, by source rank, then token; nullptr: so they lie.
    const int32_t* order = nullptr;
    bool may_pack = true;  // CUDA: rows may travel as packed pieces

    EP_HD int64_t row(int64_t index) const { return order == nullptr ? index : order[index]; }
    // What its credits say.
    EP_HD uint64_t terms() const { return normal::pack_terms(2LL * hidden, 0, topk, 0); }
};

}  // namespace ep

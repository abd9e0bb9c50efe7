// Ranks that an operation leaves out.
#pragma once

#include "ep/heap.h"
#include "host/atomics.h"

namespace ep::host {

// The mask as an operation found it when it began.
class Masks {
  public:
    explicit Masks(const Context& context) {
        if (context.knows_no_mask) return;
        for (int i = 0; i < RankMask::kWords; ++i) {
            mask_.words[i] = load_relaxed(&context.mask()->words[i]);
        }
        alone_ = mask_.has(context.rank);
    }

    // Neither sent to nor waited for.
    bool has(int r) const { return alone_ || mask_.has(r); }
    uint32_t digest() const { return mask_.digest(); }

  private:
    RankMask mask_{};
    bool alone_ = false;
};

}  // namespace ep::host

// Ranks that an operation leaves out.
#pragma once

#include "cuda/view.h"

namespace ep {

// Rarely asked: where something is wrong, or there are many ranks.
__device__ __forceinline__ bool is_masked(const View& view, int r) {
    return view.mask != nullptr && r >= 0 && (view.mask->has(r) || view.mask->has(view.rank));
}

__device__ __noinline__ inline uint32_t mask_digest(const RankMask* mask) { return mask->digest(); }

// The mask as an operation found it when it began, in a register: bit r % 32 is set if rank r is
// masked, and with more than 32 ranks also where another is. It is there as soon as the epoch is;
// where nobody is masked nothing more is loaded.
struct Absent {
    uint32_t maybe;

    static __device__ __forceinline__ Absent load(const View& view) {
        const uint64_t low = view.mask->words[0], high = view.mask->words[1];
        const bool alone = (((view.rank < 64 ? low : high) >> (view.rank & 63)) & 1) != 0;
        return {alone ? ~0u : static_cast<uint32_t>(low | (low >> 32) | high)};
    }
    // Rank r is neither sent to nor waited for.
    __device__ __forceinline__ bool has(const View& view, int r) const {
        if (((maybe >> (r & 31)) & 1) == 0) return false;
        return view.num_ranks <= 32 || is_masked(view, r);
    }
    // The same, its rare half out of line, where the length of code matters more.
    __device__ __forceinline__ bool leaves_out(const View& view, int r) const {
        return ((maybe >> (r & 31)) & 1) != 0 && surely_has(view, r);
    }
    // The expert of an entry, or none where its rank is left out.
    __device__ __forceinline__ int reachable(const View& view, int expert) const {
        return maybe == 0 ? expert : reach(view, expert);
    }
    // What the ranks that are left compare.
    __device__ __forceinline__ uint32_t digest(const View& view) const {
        return maybe != 0 ? mask_digest(view.mask) : 0;
    }

  private:
    __device__ __noinline__ bool surely_has(const View& view, int r) const { return has(view, r); }
    __device__ __noinline__ int reach(const View& view, int expert) const {
        if (expert < 0 || expert >= view.num_experts) return expert;
        return has(view, view.owner_of(expert)) ? -1 : expert;
    }
};
static_assert(RankMask::kWords == 2);

// What an operation works at: its epoch, and without whom.
struct Turn {
    uint64_t epoch;  // of a combine 0: see given_up()
    Absent absent;

    // This rank gave up in an operation before: what its dispatch left may be unfinished, and no
    // warp of a combine follows it. In the epoch, as registers are few; the same for a whole warp.
    __device__ __forceinline__ bool given_up() const { return epoch == 0; }
};

}  // namespace ep

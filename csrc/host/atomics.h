// Words that more than one rank touches. Every release here names the acquire that pairs with it.
#pragma once

#include <cstdint>

namespace ep::host {

// A tag, released after its message's bytes; paired with load_acquire in Waiter::wait.
inline void store_release(uint64_t* word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
inline uint64_t load_acquire(const uint64_t* word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

// Epochs, budgets and abort words order nothing by themselves.
inline uint64_t load_relaxed(const uint64_t* word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}
inline void store_relaxed(uint64_t* word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

// True if `word` held `expected`.
template <class T>
bool replace(T* word, T expected, T value) {
    return __atomic_compare_exchange_n(word, &expected, value, /*weak=*/false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
}
template <class T>
bool replace_zero(T* word, T value) {
    return replace(word, T{0}, value);
}

// The last 8 bytes of a slot. A stride is lines * 128 for at most lines * 120 bytes of payload, so
// a payload never reaches them.
inline uint64_t* tag_of(uint8_t* slot, int64_t stride) {
    return reinterpret_cast<uint64_t*>(slot + stride - sizeof(uint64_t));
}
inline const uint64_t* tag_of(const uint8_t* slot, int64_t stride) {
    return reinterpret_cast<const uint64_t*>(slot + stride - sizeof(uint64_t));
}

}  // namespace ep::host

// What the test programs share: ending at the first wrong thing, and zeroed memory.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "ep/platform.h"

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::_Exit(1);                                                       \
        }                                                                        \
    } while (false)

struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

inline Memory zeroed(int64_t num_bytes) {
    const auto padded = static_cast<size_t>(ep::round_up(num_bytes, 256));
    auto* p = static_cast<uint8_t*>(std::aligned_alloc(256, padded));
    std::memset(p, 0, padded);
    return Memory(p);
}

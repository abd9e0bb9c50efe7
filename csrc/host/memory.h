// Memory for heaps, local state and fault records of CPU ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ep::host {

// A mapped range; unmapped by close() or the destructor.
class Mapping {
  public:
    Mapping() = default;
    Mapping(void* address, size_t num_bytes) : address_(address), num_bytes_(num_bytes) {}
    Mapping(Mapping&& other) noexcept;
    Mapping& operator=(Mapping&& other) noexcept;
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    ~Mapping() { close(); }

    // Throws std::logic_error once closed.
    uintptr_t address() const;
    void close() noexcept;

  private:
    void* address_ = nullptr;
    size_t num_bytes_ = 0;
};

// Zeroed, page-aligned memory of this process. Throws std::invalid_argument, std::system_error.
class HostMemory {
  public:
    explicit HostMemory(int64_t num_bytes);
    uintptr_t address() const { return mapping_.address(); }
    void close() noexcept { mapping_.close(); }

  private:
    Mapping mapping_;
};

// POSIX shared memory that only this user can open. Creating it fails if the name exists, zeroes it
// and reserves its pages, so that a full /dev/shm is an error here and no SIGBUS later. Closing
// unmaps; the name lives until unlink().
class ShmSegment {
  public:
    ShmSegment(const std::string& name, int64_t num_bytes, bool create);
    uintptr_t address() const { return mapping_.address(); }
    void unlink();  // no error if the name is gone already
    void close() noexcept { mapping_.close(); }

  private:
    std::string name_;
    Mapping mapping_;
};

}  // namespace ep::host

// Device and pinned memory that this module owns. Addresses only; close() is idempotent.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace ep {

class DeviceMemory {
  public:
    DeviceMemory(int64_t bytes, int device);  // zeroed
    ~DeviceMemory() { close(); }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    std::uintptr_t address() const { return address_; }
    std::string ipc_handle() const;
    void close() noexcept;

  private:
    std::uintptr_t address_ = 0;
    int device_;
};

// Another process's DeviceMemory.
class IpcMapping {
  public:
    IpcMapping(const std::string& handle, int device);
    ~IpcMapping() { close(); }
    IpcMapping(const IpcMapping&) = delete;
    IpcMapping& operator=(const IpcMapping&) = delete;

    std::uintptr_t address() const { return address_; }
    void close() noexcept;

  private:
    std::uintptr_t address_ = 0;
    int device_;
};

// Host memory that kernels write at the same address.
class PinnedMemory {
  public:
    explicit PinnedMemory(int64_t bytes);  // zeroed
    ~PinnedMemory() { close(); }
    PinnedMemory(const PinnedMemory&) = delete;
    PinnedMemory& operator=(const PinnedMemory&) = delete;

    std::uintptr_t address() const { return address_; }
    void close() noexcept;

  private:
    std::uintptr_t address_ = 0;
};

int device_count();  // 0 without a driver
std::map<std::string, int> device_attributes(int device);
bool can_access_peer(int device, int peer);
void enable_peer_access(int device, int peer);
void fill_zero(std::uintptr_t address, int64_t bytes, int device);

}  // namespace ep

#include "cuda/memory.h"

#include <cstring>
#include <stdexcept>

#include "cuda/device_guard.h"

namespace ep {

DeviceMemory::DeviceMemory(int64_t bytes, int device) : device_(device) {
    if (bytes <= 0) throw std::invalid_argument("num_bytes must be positive");
    const DeviceGuard guard(device);
    void* p = nullptr;
    EP_CUDA(cudaMalloc(&p, static_cast<size_t>(bytes)));
    address_ = reinterpret_cast<std::uintptr_t>(p);
    try {
        fill_zero(address_, bytes, device);
    } catch (...) {
        close();  // no destructor runs
        throw;
    }
}

std::string DeviceMemory::ipc_handle() const {
    const DeviceGuard guard(device_);
    cudaIpcMemHandle_t handle{};
    EP_CUDA(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(address_)));
    return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

// Runs in destructors, perhaps after the driver has gone: a failure has nobody left to tell.
void DeviceMemory::close() noexcept {
    if (address_ == 0) return;
    int previous = 0;
    if (cudaGetDevice(&previous) == cudaSuccess && cudaSetDevice(device_) == cudaSuccess) {
        cudaFree(reinterpret_cast<void*>(address_));
        cudaSetDevice(previous);
    }
    address_ = 0;
}

IpcMapping::IpcMapping(const std::string& handle, int device) : device_(device) {
    cudaIpcMemHandle_t raw{};
    if (handle.size() != sizeof(raw)) throw std::invalid_argument("an IPC handle has 64 bytes");
    std::memcpy(&raw, handle.data(), sizeof(raw));
    const DeviceGuard guard(device);
    void* p = nullptr;
    EP_CUDA(cudaIpcOpenMemHandle(&p, raw, cudaIpcMemLazyEnablePeerAccess));
    address_ = reinterpret_cast<std::uintptr_t>(p);
}

void IpcMapping::close() noexcept {
    if (address_ == 0) return;
    int previous = 0;
    if (cudaGetDevice(&previous) == cudaSuccess && cudaSetDevice(device_) == cudaSuccess) {
        cudaIpcCloseMemHandle(reinterpret_cast<void*>(address_));
        cudaSetDevice(previous);
    }
    address_ = 0;
}

PinnedMemory::PinnedMemory(int64_t bytes) {
    if (bytes <= 0) throw std::invalid_argument("num_bytes must be positive");
    void* p = nullptr;
    EP_CUDA(
        cudaHostAlloc(&p, static_cast<size_t>(bytes), cudaHostAllocMapped | cudaHostAllocPortable));
    std::memset(p, 0, static_cast<size_t>(bytes));
    address_ = reinterpret_cast<std::uintptr_t>(p);
}

void PinnedMemory::close() noexcept {
    if (address_ != 0) cudaFreeHost(reinterpret_cast<void*>(address_));
    address_ = 0;
}

int device_count() {
    int n = 0;
    const cudaError_t rc = cudaGetDeviceCount(&n);
    if (rc == cudaErrorNoDevice || rc == cudaErrorInsufficientDriver) return 0;
    check_cuda(rc, "cudaGetDeviceCount");
    return n;
}

std::map<std::string, int> device_attributes(int device) {
    static constexpr std::pair<const char*, cudaDeviceAttr> kAttributes[] = {
        {"num_sms", cudaDevAttrMultiProcessorCount},
        {"major", cudaDevAttrComputeCapabilityMajor},
        {"minor", cudaDevAttrComputeCapabilityMinor},
        {"l2_bytes", cudaDevAttrL2CacheSize},
        {"shared_bytes_per_sm", cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        {"host_native_atomics", cudaDevAttrHostNativeAtomicSupported},
    };
    std::map<std::string, int> out;
    for (const auto& [name, attribute] : kAttributes) {
        EP_CUDA(cudaDeviceGetAttribute(&out[name], attribute, device));
    }
    return out;
}

bool can_access_peer(int device, int peer) {
    int can = 0;
    EP_CUDA(cudaDeviceCanAccessPeer(&can, device, peer));
    return can != 0;
}

void enable_peer_access(int device, int peer) {
    const DeviceGuard guard(device);
    const cudaError_t rc = cudaDeviceEnablePeerAccess(peer, 0);
    if (rc == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();  // torch may have done it: not an error, but it must not linger
        return;
    }
    check_cuda(rc, "cudaDeviceEnablePeerAccess");
}

void fill_zero(std::uintptr_t address, int64_t bytes, int device) {
    const DeviceGuard guard(device);
    EP_CUDA(cudaMemset(reinterpret_cast<void*>(address), 0, static_cast<size_t>(bytes)));
    EP_CUDA(cudaDeviceSynchronize());
}

}  // namespace ep

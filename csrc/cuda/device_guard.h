// Makes a device current for a scope: one process may drive ranks on several GPUs.
#pragma once

#include "cuda/error.h"

namespace ep {

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : device_(device) {
        EP_CUDA(cudaGetDevice(&previous_));
        if (previous_ != device_) EP_CUDA(cudaSetDevice(device_));
    }
    ~DeviceGuard() {
        if (previous_ != device_) cudaSetDevice(previous_);  // it was current a moment ago
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int device_;
    int previous_ = 0;
};

}  // namespace ep

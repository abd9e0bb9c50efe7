// CUDA return codes become exceptions that name the call.
#pragma once

#include <stdexcept>
#include <string>

namespace ep {

class CudaFailure : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace ep

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace ep {

inline void check_cuda(cudaError_t rc, const char* call) {
    if (rc == cudaSuccess) return;
    throw CudaFailure(std::string(call) + " failed: " + cudaGetErrorName(rc) + " (" +
                      cudaGetErrorString(rc) + ")");
}

}  // namespace ep

#define EP_CUDA(call) ::ep::check_cuda((call), #call)
#endif

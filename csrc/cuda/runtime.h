// The one door to the CUDA runtime: what the kernels use of it, and how they are launched. A test may put its own runtime
// in front (GRADPROJ_EMULATION names a header) and run the same kernels on the CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef GRADPROJ_EMULATION
#include GRADPROJ_EMULATION
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace gradproj::cuda {

#ifdef GRADPROJ_EMULATION
constexpr int kThreads = emulation::kThreads, kMostSegments = emulation::kMostSegments;
#else
constexpr int kThreads = 256;
constexpr int kMostSegments = 1000;  // of one launch
#endif
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRows = 65;  // the gradient and 64 directions
constexpr int kMaxDims = 8;   // of a strided segment
constexpr int64_t kMaxBlocks = 1024;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("gradproj: ") + what + " failed: " + cudaGetErrorString(status) +
                             "; the device's context may be unusable, restart the process");
}

// what: for the error message. The arguments are copied once, by the driver: they may be 32 KB.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream,
            const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "the kernel would read other bytes");
#ifdef GRADPROJ_EMULATION
  emulation::launch(blocks, [&] { kernel(arguments...); });
  (void)what, (void)stream;
#else
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), what);
#endif
}

}  // namespace gradproj::cuda

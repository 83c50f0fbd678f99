// What the kernels use of the CUDA runtime, and how they are launched. A test may bring its own runtime
// (GRADPROJ_EMULATION names a header) and run the same kernels on the CPU.
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

struct Device {
  cudaStream_t stream;
  int64_t most_blocks;  // of a grid; fixed for a device, because the order of sums depends on it
  bool starts_early;    // has programmatic dependent launch
};

// Programmatic dependent launch: blocks of the next kernel start while the last ones of this kernel run, and must wait
// for its end before touching memory that either kernel writes. Elsewhere both functions do nothing.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// early: may start before the last kernel on the stream has ended, for which it waits by itself. what: for the error.
// The arguments are copied once, by the driver: they may be 32 KB.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, const Device& device, bool early,
            const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "the kernel would read other bytes");
#ifdef GRADPROJ_EMULATION
  emulation::launch(blocks, [&] { kernel(arguments...); });
  (void)what, (void)device, (void)early;
#else
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = device.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early && device.starts_early ? 1 : 0;
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), what);
#endif
}

}  // namespace gradproj::cuda

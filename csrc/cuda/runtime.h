// The one door to the CUDA runtime: what the kernels use of it, and how they are launched. A test may put its own runtime
// in front (GRADPROJ_EMULATION names a header) and run the same kernels on the CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef GRADPROJ_EMULATION
#include GRADPROJ_EMULATION
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GRADPROJ_LAUNCH(kernel, grid, stream, ...)                                    \
  do {                                                                                \
    (kernel)<<<(grid), gradproj::cuda::kThreads, 0, (stream)>>>(__VA_ARGS__);         \
    gradproj::cuda::check(cudaGetLastError(), "launch of " #kernel);                  \
  } while (0)
#endif

namespace gradproj::cuda {

#ifdef GRADPROJ_EMULATED_THREADS
constexpr int kThreads = GRADPROJ_EMULATED_THREADS;
#else
constexpr int kThreads = 256;
#endif
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRows = 65;        // a gradient and 64 directions
constexpr int kMaxBuffers = 66;     // of a column: the rows and a base
constexpr int kMaxDims = 8;         // of a strided piece, coalesced
constexpr int64_t kMaxBlocks = 1024;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("gradproj: ") + what + " failed: " + cudaGetErrorString(status) +
                             "; the device's context may be unusable, restart the process");
}

}  // namespace gradproj::cuda

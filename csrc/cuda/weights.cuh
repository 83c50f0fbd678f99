// Gram -> weights on the device: the rules of csrc/weights.h, by one block per part.
#pragma once

#include "../weights.h"
#include "runtime.h"

namespace gradproj::cuda {

// A warp per row of the tableau, so that neighbours in a row are neighbours in a warp.
struct WholeBlock {
  static constexpr int rows = kWarps, columns = 32;
  int row, column;
  __device__ void sync() const { __syncthreads(); }
};

// gram [parts, R, R] -> weights [parts, R]. Reads the Gram about twice; the tableau, up to 35 KiB, is in shared memory.
// Every thread makes the same decisions from its diagonal and last column, so a sweep needs only three barriers.
__global__ __launch_bounds__(kThreads) void weights_kernel(Rule rule, const double* gram, int R, double* weights) {
  __shared__ double scratch[weights_scratch(kMaxRows)];
  const WholeBlock team{static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32};
  const int64_t part = blockIdx.x;
  solve_weights(team, rule, gram + part * R * R, R, weights + part * R, scratch);
}

}  // namespace gradproj::cuda

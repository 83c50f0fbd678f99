// Gram -> weights on the device.
#pragma once

#include "../weights.h"
#include "runtime.h"

namespace gradproj::cuda {

// A block: a warp per row of the tableau, so that neighbours in a row are neighbours in a warp.
struct WholeBlock {
  static constexpr int rows = kWarps, columns = 32;
  int row, column;
  __device__ void sync() const { __syncthreads(); }
};

// A part per block: gram[parts x R x R] -> weights[parts x R]. Reads the Gram about twice; the tableau, up to 35 KiB, stays in
// shared memory. Every thread makes the same decisions from the tableau's diagonal and last column, so a sweep needs three
// barriers and nothing else.
template <int = 0>  // so that it may be defined in a header
__global__ __launch_bounds__(kThreads) void weights_kernel(Rule rule, const double* gram, int R, double* weights) {
  __shared__ double scratch[weights_scratch(kMaxRows)];
  const WholeBlock team{static_cast<int>(threadIdx.x) / 32, static_cast<int>(threadIdx.x) % 32};
  const int64_t part = blockIdx.x;
  solve_weights(team, rule, gram + part * R * R, R, weights + part * R, scratch);
}

inline void launch_weights(cudaStream_t stream, Rule rule, const double* gram, int64_t parts, int R, double* weights) {
  if (parts > 0) GRADPROJ_LAUNCH((weights_kernel<>), dim3(static_cast<unsigned>(parts)), stream, rule, gram, R, weights);
}

}  // namespace gradproj::cuda

// Gram -> weights on the device.
#pragma once

#include "../weights.h"
#include "runtime.h"

namespace gradproj::cuda {

// One thread per part, each in a block of its own: a few thousand operations on data of a few KiB. scratch (weights_scratch(R)
// doubles per part) lies in global memory and stays in L1: shared memory would have to be opted into beyond K = 52.
template <int = 0>  // so that it may be defined in a header
__global__ void weights_kernel(Rule rule, const double* gram, int R, double* weights, double* scratch) {
  const int64_t part = blockIdx.x;
  if (threadIdx.x == 0)
    solve_weights(rule, gram + part * R * R, R, weights + part * R, scratch + part * weights_scratch(R));
}

// gram [parts, R, R] -> weights [parts, R]. scratch: parts * weights_scratch(R) doubles.
inline void launch_weights(cudaStream_t stream, Rule rule, const double* gram, int parts, int R, double* weights, double* scratch) {
  if (parts == 0) return;
  GRADPROJ_LAUNCH((weights_kernel<>), dim3(static_cast<unsigned>(parts)), stream, rule, gram, R, weights, scratch);
}

}  // namespace gradproj::cuda

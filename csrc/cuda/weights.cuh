// Gram -> weights on the device.
#pragma once

#include "../weights.h"
#include "runtime.h"

namespace gradproj::cuda {

// One thread: a few thousand operations on data of a few KiB, with nothing worth sharing out. scratch (weights_scratch(R)
// doubles) lies in global memory and stays in L1: shared memory would have to be opted into beyond K = 52.
template <int = 0>  // so that it may be defined in a header
__global__ void weights_kernel(Rule rule, const double* gram, int R, double* weights, double* scratch) {
  if (threadIdx.x == 0) solve_weights(rule, gram, R, weights, scratch);
}

inline void launch_weights(cudaStream_t stream, Rule rule, const double* gram, int R, double* weights, double* scratch) {
  GRADPROJ_LAUNCH((weights_kernel<>), dim3(1), stream, rule, gram, R, weights, scratch);
}

}  // namespace gradproj::cuda

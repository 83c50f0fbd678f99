// weights: launches weights.cuh.
#include "launch.h"
#include "weights.cuh"

namespace gradproj::cuda {

void launch_weights(const Device& device, Rule rule, const double* gram, int64_t parts, int R, double* weights) {
  check_rows(R);
  if (parts > 0) launch("launch of weights", weights_kernel, parts, device, false, rule, gram, R, weights);
}

}  // namespace gradproj::cuda

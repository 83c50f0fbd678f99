// weights: launches weights.cuh, and the op.
#include "launch.h"
#include "weights.cuh"

namespace gradproj::cuda {

void launch_weights(const Device& device, Rule rule, const double* gram, int64_t parts, int R, double* weights) {
  if (R > kMaxRows)
    throw PlanError("gradproj: " + std::to_string(R - 1) + " directions; the CUDA kernels take up to " +
                    std::to_string(kMaxRows - 1));
  if (parts > 0) launch("launch of weights", weights_kernel, parts, device, false, rule, gram, R, weights);
}

}  // namespace gradproj::cuda

#ifndef GRADPROJ_EMULATION
#include "context.h"

namespace gradproj::cuda {
namespace {

Tensor weights_op(Tensor gram, std::string method, double gamma, double eps) {
  const auto [parts, rows] = gram_shape(gram);
  const Context context({aoti_torch_device_type_cuda(), gram.get_device_index()});
  Tensor weights = gram.dim() == 2 ? context.doubles({rows}) : context.doubles({parts, rows});
  launch_weights(context.device, parse_rule(method, gamma, eps), context.small(gram, parts * rows * rows, "gram"), parts,
                 rows, data(weights));
  return weights;
}

}  // namespace
}  // namespace gradproj::cuda

STABLE_TORCH_LIBRARY_IMPL(gradproj, CUDA, m) { m.impl("weights", TORCH_BOX(&gradproj::cuda::weights_op)); }
#endif

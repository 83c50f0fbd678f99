// Gram -> weights of every part; see ../weights.h.
#include "../weights.h"

#include "ops.h"
#include "walk.h"

namespace gradproj::cpu {

// gram: [parts, R, R] -> weights: [parts, R]. Parts are handed to torch's threads once there is more work than that
// costs; the result does not depend on how many there are.
void weights(Rule rule, const double* gram, int64_t parts, int num_rows, double* weights) {
  const int64_t R = num_rows;
  // A part is about R^3 operations, half a nanosecond each: 100 us make a task.
  const int64_t per_task = std::max<int64_t>(1, 200'000 / (R * R * R));
  parallel((parts + per_task - 1) / per_task, [&](int64_t task) {
    std::vector<double> scratch(static_cast<size_t>(weights_scratch(num_rows)));
    for (int64_t p = task * per_task; p < std::min(parts, (task + 1) * per_task); ++p)
      solve_weights(Alone{}, rule, gram + p * R * R, num_rows, weights + p * R, scratch.data());
  });
}

namespace {

Tensor weights_op(Tensor gram, std::string method, double gamma, double eps) {
  const auto [parts, rows] = gram_shape(gram);
  Tensor result = gram.dim() == 2 ? new_tensor({rows}) : new_tensor({parts, rows});
  weights(parse_rule(method, gamma, eps), elements(gram, parts * rows * rows, "gram"), parts, rows, data(result));
  return result;
}

}  // namespace
}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("weights", TORCH_BOX(&gradproj::cpu::weights_op)); }

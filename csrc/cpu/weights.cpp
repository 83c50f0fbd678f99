// Gram -> weights of every part; see ../weights.h.
#include "context.h"
#include "walk.h"

namespace gradproj::cpu {

// Parts are handed to torch's threads once there is more work than that costs; the result does not depend on how many
// there are.
void Context::weights(Rule rule, const double* gram, int64_t parts, int R, double* weights) {
  const int64_t size = int64_t{R} * R;
  // A part is about R^3 operations, half a nanosecond each: 100 us make a task.
  const int64_t per_task = std::max<int64_t>(1, 200'000 / (size * R));
  parallel((parts + per_task - 1) / per_task, [&](int64_t task) {
    std::vector<double> scratch(weights_scratch(R));
    for (int64_t p = task * per_task; p < std::min(parts, (task + 1) * per_task); ++p)
      solve_weights(Alone{}, rule, gram + p * size, R, weights + p * R, scratch.data());
  });
}

}  // namespace gradproj::cpu

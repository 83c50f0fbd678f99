#include "weights.h"

#include "walk.h"

namespace gradproj::cpu {

void solve_parts(Rule rule, const double* gram, int64_t parts, int R, double* weights) {
  // A part is about R^3 operations, half a nanosecond each: 100 us make a task.
  const int64_t per_task = std::max<int64_t>(1, 200'000 / (int64_t{R} * R * R));
  Tasks tasks{};
  tasks.count = (parts + per_task - 1) / per_task;
  for_each_task(tasks, false, [&](int64_t task) {
    std::vector<double> scratch(static_cast<size_t>(weights_scratch(R)));
    for (int64_t p = task * per_task; p < std::min(parts, (task + 1) * per_task); ++p)
      solve_weights(Alone{}, rule, gram + p * R * R, R, weights + p * R, scratch.data());
  });
}

}  // namespace gradproj::cpu

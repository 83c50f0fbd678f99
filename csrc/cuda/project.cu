// project_: Gram, weights and combine as one op.
#include "launch.h"

namespace gradproj::cuda {

// K = 1 and one part are two launches with nothing in between: combine adds the Gram's slots up and solves by itself.
void launch_project(const Device& device, const Plan& plan, Rule rule, const double* gram_dd, double* scratch,
                    double* gram, double* weights) {
  if (plan.rows == 2 && plan.parts == 1 && !gram_dd && !plan.segments.empty()) {
    const int32_t count = launch_gram_slots(device, plan, scratch);
    return launch_combine(device, plan, {weights, scratch, gram, rule, count});
  }
  launch_gram(device, plan, gram_dd, scratch, gram);
  launch_weights(device, rule, gram, plan.parts, plan.rows, weights);
  launch_combine(device, plan, {weights});
}

}  // namespace gradproj::cuda

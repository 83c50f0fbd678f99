// project_: Gram, weights and combine as one op.
#include "launch.h"

namespace gradproj::cuda {

// K = 1 and one part are two launches with nothing in between: combine adds the Gram's slots up and solves by itself.
void launch_project(const Device& device, const Plan& plan, Rule rule, const double* gram_dd, double* scratch, double* gram,
                    double* weights) {
  if (plan.rows == 2 && plan.parts == 1 && !gram_dd && !plan.segments.empty()) {
    const int32_t slots = launch_gram_slots(device, plan, scratch);
    launch_combine_slots(device, plan, rule, scratch, slots, gram, weights);
    return;
  }
  launch_gram(device, plan, gram_dd, scratch, gram);
  launch_weights(device, rule, gram, plan.parts, plan.rows, weights);
  launch_combine(device, plan, weights);
}

}  // namespace gradproj::cuda

#ifndef GRADPROJ_EMULATION
#include "context.h"

namespace gradproj::cuda {
namespace {

std::tuple<Tensor, Tensor> project_op(StableListHandle grads, StableListHandle directions, std::string method, double gamma,
                                      double eps, std::optional<Tensor> gram_dd, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {parts, num_parts});
  const Rule rule = parse_rule(method, gamma, eps);
  const Plan plan = plan_to_write(rows);
  const Context context(rows.where());
  Tensor gram = context.doubles(rows.shape(2)), weights = context.doubles(rows.shape(1));
  Tensor scratch = context.doubles({gram_scratch(context.device, plan)});
  launch_project(context.device, plan, rule, context.gram_dd(gram_dd, plan), data(scratch), data(gram), data(weights));
  return {gram, weights};
}

}  // namespace
}  // namespace gradproj::cuda

STABLE_TORCH_LIBRARY_IMPL(gradproj, CUDA, m) { m.impl("project_", TORCH_BOX(&gradproj::cuda::project_op)); }
#endif

// The whole projection of row 0: gram, weights, combine. Moves (R + R + 1) N bytes: 5 N for one direction.
#include "ops.h"

namespace gradproj::cpu {
namespace {

std::tuple<Tensor, Tensor> project_op(StableListHandle grads, StableListHandle directions, std::string method, double gamma,
                                      double eps, std::optional<Tensor> gram_dd, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {parts, num_parts});
  const Rule rule = parse_rule(method, gamma, eps);
  const Plan plan = plan_to_write(rows);
  Tensor products = new_tensor(rows.shape(2)), chosen = new_tensor(rows.shape(1));
  gram(plan, gram_dd_elements(gram_dd, plan), data(products));
  weights(rule, data(products), plan.parts, plan.rows, data(chosen));
  combine(plan, data(chosen));
  return {products, chosen};
}

}  // namespace
}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("project_", TORCH_BOX(&gradproj::cpu::project_op)); }

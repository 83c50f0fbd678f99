// The op project_: a Gram, its weights, and the combination, on one plan.
#include "arguments.h"
#include "combine.h"
#include "gram.h"
#include "weights.h"

namespace gradproj::cpu {
namespace {

std::tuple<Tensor, Tensor> project_op(StableListHandle grads, StableListHandle directions, std::string method, double gamma,
                                      double eps, std::optional<Tensor> gram_dd, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {parts, num_parts});
  const Rule rule = parse_rule(method, gamma, eps);
  const Plan plan = plan_to_write(rows);
  Tensor products = new_tensor(rows.shape(2)), weights = new_tensor(rows.shape(1));
  gram(plan, small_gram_dd(gram_dd, rows.layout()), data(products));
  solve_parts(rule, data(products), plan.parts, plan.rows, data(weights));
  combine(plan, data(weights));
  return {products, weights};
}

}  // namespace
}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("project_", TORCH_BOX(&gradproj::cpu::project_op)); }

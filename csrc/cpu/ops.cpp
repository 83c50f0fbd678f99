// The native ops for CPU tensors: unpack, check, plan, run. Schemas and fakes: python/gradproj/ops.py.
#include "../overlap.h"
#include "../tensors.h"
#include "combine.h"
#include "gram.h"
#include "weights.h"

namespace gradproj::cpu {
namespace {

using torch::stable::Tensor;

Tensor new_tensor(std::vector<int64_t> shape) {
  return torch::stable::empty(shape, torch::headeronly::ScalarType::Double, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

double* data(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// A small float64 argument as the kernels read it.
const double* small(const Tensor& t, int64_t numel, const char* name) {
  if (!t.is_cpu() || t.scalar_type() != torch::headeronly::ScalarType::Double || t.numel() != numel || !t.is_contiguous())
    throw PlanError(std::string("gradproj: ") + name + " must be a contiguous float64 CPU tensor of " +
                    std::to_string(numel) + " elements");
  return static_cast<const double*>(t.const_data_ptr());
}

const double* known_gram(const std::optional<Tensor>& known, const Rows& rows) {
  const int64_t k = rows.gram_rows() - 1;
  return known ? small(*known, rows.layout().parts * k * k, "known") : nullptr;
}

Tensor gram_op(StableListHandle list, int64_t num_rows, std::optional<Tensor> known, std::optional<StableListHandle> base,
               std::optional<StableListHandle> scales, StableListHandle parts, int64_t num_parts) {
  const Rows rows(list, num_rows, {base, scales, parts, num_parts});
  Tensor result = new_tensor(rows.shape(2));
  gram(make_plan(rows.buffers(), rows.layout()), known_gram(known, rows), data(result));
  return result;
}

Tensor weights_op(Tensor gram, std::string method, double gamma, double eps) {
  const auto [parts, rows] = gram_shape(gram);
  Tensor result = gram.dim() == 2 ? new_tensor({rows}) : new_tensor({parts, rows});
  solve_parts(parse_rule(method, gamma, eps), small(gram, parts * rows * rows, "gram"), parts, rows, data(result));
  return result;
}

// The plan of an op that writes row 0, refused if that row may not be written.
Plan plan_to_write(const Rows& rows) {
  Plan plan = make_plan(rows.buffers(), rows.layout());
  check_writable(rows.buffers(), rows.layout().rows);
  return plan;
}

void combine_op(StableListHandle grads, StableListHandle directions, Tensor weights, std::optional<StableListHandle> base,
                std::optional<StableListHandle> scales, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {base, scales, parts, num_parts});
  const Plan plan = plan_to_write(rows);
  combine(plan, small(weights, int64_t{plan.parts} * plan.gram_rows(), "weights"));
}

std::tuple<Tensor, Tensor> project_op(StableListHandle grads, StableListHandle directions, std::string method, double gamma,
                                      double eps, std::optional<Tensor> known, std::optional<StableListHandle> base,
                                      std::optional<StableListHandle> scales, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {base, scales, parts, num_parts});
  const Rule rule = parse_rule(method, gamma, eps);
  const Plan plan = plan_to_write(rows);
  Tensor products = new_tensor(rows.shape(2)), weights = new_tensor(rows.shape(1));
  gram(plan, known_gram(known, rows), data(products));
  solve_parts(rule, data(products), plan.parts, plan.gram_rows(), data(weights));
  combine(plan, data(weights));
  return {products, weights};
}

}  // namespace
}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) {
  m.impl("gram", TORCH_BOX(&gradproj::cpu::gram_op));
  m.impl("weights", TORCH_BOX(&gradproj::cpu::weights_op));
  m.impl("combine_", TORCH_BOX(&gradproj::cpu::combine_op));
  m.impl("project_", TORCH_BOX(&gradproj::cpu::project_op));
}

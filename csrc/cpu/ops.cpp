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

const double* known_gram(const std::optional<Tensor>& known, int rows) {
  return known ? small(*known, int64_t{rows - 1} * (rows - 1), "known") : nullptr;
}

Tensor gram_op(StableListHandle list, int64_t num_rows, std::optional<Tensor> known) {
  const TensorList tensors(list, true);
  std::vector<Buffer> buffers;
  buffers.reserve(tensors.size());
  Where where;
  append_buffers(tensors, buffers, where);
  const int rows = static_cast<int>(num_rows);
  Tensor result = new_tensor({num_rows, num_rows});
  gram(make_plan(buffers, rows), known_gram(known, rows), data(result));
  return result;
}

Tensor weights_op(Tensor gram, std::string method, double gamma, double eps) {
  const auto [parts, rows] = gram_shape(gram);
  Tensor result = gram.dim() == 2 ? new_tensor({rows}) : new_tensor({parts, rows});
  solve_parts(parse_rule(method, gamma, eps), small(gram, parts * rows * rows, "gram"), parts, rows, data(result));
  return result;
}

// The plan of an op that writes its first list, refused if that list may not be written.
Plan plan_to_write(const TensorList& grads, const TensorList& directions) {
  std::vector<Buffer> buffers;
  buffers.reserve(grads.size() + directions.size());
  Where where;
  append_buffers(grads, buffers, where);
  append_buffers(directions, buffers, where);
  const int rows = count_rows(grads.size(), directions.size());
  Plan plan = make_plan(buffers, rows);
  check_writable(buffers, rows);
  return plan;
}

void combine_op(StableListHandle grad_list, StableListHandle direction_list, Tensor weights) {
  const TensorList grads(grad_list, false), directions(direction_list, true);
  const Plan plan = plan_to_write(grads, directions);
  combine(plan, small(weights, plan.rows, "weights"));
}

std::tuple<Tensor, Tensor> project_op(StableListHandle grad_list, StableListHandle direction_list, std::string method,
                                      double gamma, double eps, std::optional<Tensor> known) {
  const TensorList grads(grad_list, false), directions(direction_list, true);
  const Rule rule = parse_rule(method, gamma, eps);
  const Plan plan = plan_to_write(grads, directions);
  Tensor products = new_tensor({plan.rows, plan.rows}), weights = new_tensor({plan.rows});
  gram(plan, known_gram(known, plan.rows), data(products));
  solve_parts(rule, data(products), 1, plan.rows, data(weights));
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

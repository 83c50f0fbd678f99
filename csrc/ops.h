// The ops, once for CPU and CUDA: each unpacks its arguments, checks them, makes the outputs, and runs. A Context runs
// the steps on the device of the buffers, from which it is made:
//   gram(plan, gram_dd, gram)                   [parts, R - 1, R - 1] or null -> [parts, R, R]
//   weights(rule, gram, parts, R, weights)      [parts, R, R] -> [parts, R]
//   combine(plan, weights)                      row 0 <- sum_r weights[part, r] row r
//   project(plan, rule, gram_dd, gram, weights) the three, one after the other
// Schemas and fakes: python/gradproj/kernels/ops.py.
#pragma once

#include <tuple>

#include "tensors.h"
#include "weights.h"

namespace gradproj {

using torch::stable::Tensor;

inline double* data(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

inline Tensor new_doubles(Place place, const std::vector<int64_t>& shape) {
  const torch::stable::Device device(static_cast<torch::headeronly::DeviceType>(place.type), place.index);
  return torch::stable::empty(shape, torch::headeronly::ScalarType::Double, std::nullopt, device);
}

// The elements of a small argument.
inline const double* doubles(const Tensor& t, Place place, int64_t numel, const char* name) {
  if (place_of(t.get()) != place || t.scalar_type() != torch::headeronly::ScalarType::Double || t.numel() != numel ||
      !t.is_contiguous())
    throw PlanError(std::string("gradproj: ") + name + " must be a contiguous float64 tensor of " +
                    std::to_string(numel) + " elements on the device of the buffers");
  return static_cast<const double*>(t.const_data_ptr());
}

inline const double* gram_dd_elements(const std::optional<Tensor>& gram_dd, Place place, const Plan& plan) {
  const int64_t k = plan.rows - 1;
  return gram_dd ? doubles(*gram_dd, place, plan.parts * k * k, "gram_dd") : nullptr;
}

inline Rule parse_rule(const std::string& method, double gamma, double eps) {
  if (method == "orthogonal") return {Method::orthogonal, gamma, eps};
  if (method == "conflict") return {Method::conflict, gamma, eps};
  if (method == "mix") return {Method::mix, gamma, eps};
  if (method == "pcgrad") return {Method::pcgrad, gamma, eps};
  throw PlanError("gradproj: unknown method " + method);
}

template <typename Context>
struct Ops {
  using Numbers = std::vector<int64_t>;  // the schema's `parts`: the part of every column

  static Tensor gram(StableListHandle list, int64_t num_rows, std::optional<Tensor> gram_dd, Numbers part,
                     int64_t parts) {
    const Rows rows(list, num_rows, std::move(part), parts);
    const Plan plan = rows.plan_to_read();
    const Context context(rows.place());
    Tensor gram = new_doubles(rows.place(), rows.shape(2));
    context.gram(plan, gram_dd_elements(gram_dd, rows.place(), plan), data(gram));
    return gram;
  }
  static Tensor weights(Tensor gram, std::string method, double gamma, double eps) {
    const Place place = place_of(gram.get());
    const int64_t ndim = gram.dim(), rows = ndim > 0 ? gram.size(ndim - 1) : 0;
    if ((ndim != 2 && ndim != 3) || rows < 1 || gram.size(ndim - 2) != rows)
      throw PlanError("gradproj: gram must have shape [rows, rows] or [parts, rows, rows]");
    const int64_t parts = ndim == 3 ? gram.size(0) : 1;
    const Rule rule = parse_rule(method, gamma, eps);
    const Context context(place);
    const double* elements = doubles(gram, place, parts * rows * rows, "gram");
    Tensor weights = ndim == 3 ? new_doubles(place, {parts, rows}) : new_doubles(place, {rows});
    context.weights(rule, elements, parts, static_cast<int>(rows), data(weights));
    return weights;
  }
  static void combine(StableListHandle grads, StableListHandle directions, Tensor weights, Numbers part,
                      int64_t parts) {
    const Rows rows(grads, directions, std::move(part), parts);
    const Plan plan = rows.plan_to_write();
    const Context context(rows.place());
    context.combine(plan, doubles(weights, rows.place(), int64_t{plan.parts} * plan.rows, "weights"));
  }
  static std::tuple<Tensor, Tensor> project(StableListHandle grads, StableListHandle directions, std::string method,
                                            double gamma, double eps, std::optional<Tensor> gram_dd, Numbers part,
                                            int64_t parts) {
    const Rows rows(grads, directions, std::move(part), parts);
    const Rule rule = parse_rule(method, gamma, eps);
    const Plan plan = rows.plan_to_write();
    const Context context(rows.place());
    Tensor gram = new_doubles(rows.place(), rows.shape(2)), weights = new_doubles(rows.place(), rows.shape(1));
    context.project(plan, rule, gram_dd_elements(gram_dd, rows.place(), plan), data(gram), data(weights));
    return {gram, weights};
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("gram", TORCH_BOX(&Ops::gram));
    m.impl("weights", TORCH_BOX(&Ops::weights));
    m.impl("combine_", TORCH_BOX(&Ops::combine));
    m.impl("project_", TORCH_BOX(&Ops::project));
  }
};

}  // namespace gradproj

// What the ops of this folder share: one file each, with its arguments, its check and its registration for CPU tensors.
// Schemas and fakes: python/gradproj/kernels/ops.py.
#pragma once

#include "../overlap.h"
#include "../tensors.h"

namespace gradproj::cpu {

using torch::stable::Tensor;

// The steps that project_ runs one after the other; each is described where it is defined. gram_dd may be null.
void gram(const Plan& plan, const double* gram_dd, double* gram);
void weights(Rule rule, const double* gram, int64_t parts, int num_rows, double* weights);
void combine(const Plan& plan, const double* weights);

inline Tensor new_tensor(std::vector<int64_t> shape) {
  return torch::stable::empty(shape, torch::headeronly::ScalarType::Double, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

inline double* data(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// The elements of a small float64 argument.
inline const double* elements(const Tensor& t, int64_t numel, const char* name) {
  if (!t.is_cpu() || t.scalar_type() != torch::headeronly::ScalarType::Double || t.numel() != numel || !t.is_contiguous())
    throw PlanError(std::string("gradproj: ") + name + " must be a contiguous float64 CPU tensor of " +
                    std::to_string(numel) + " elements");
  return static_cast<const double*>(t.const_data_ptr());
}

inline const double* gram_dd_elements(const std::optional<Tensor>& gram_dd, const Plan& plan) {
  return gram_dd ? elements(*gram_dd, int64_t{plan.parts} * (plan.rows - 1) * (plan.rows - 1), "gram_dd") : nullptr;
}

// The plan of an op that writes row 0; refuses a row that may not be written.
inline Plan plan_to_write(const Rows& rows) {
  Plan plan = make_plan(rows.buffers(), rows.layout());
  check_writable(rows.buffers(), plan.rows);
  return plan;
}

}  // namespace gradproj::cpu

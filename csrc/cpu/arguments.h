// What the ops for CPU tensors share: results, and small arguments as the kernels read them.
#pragma once

#include "../overlap.h"
#include "../tensors.h"

namespace gradproj::cpu {

using torch::stable::Tensor;

inline Tensor new_tensor(std::vector<int64_t> shape) {
  return torch::stable::empty(shape, torch::headeronly::ScalarType::Double, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

inline double* data(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

inline const double* small(const Tensor& t, int64_t numel, const char* name) {
  if (!t.is_cpu() || t.scalar_type() != torch::headeronly::ScalarType::Double || t.numel() != numel || !t.is_contiguous())
    throw PlanError(std::string("gradproj: ") + name + " must be a contiguous float64 CPU tensor of " + std::to_string(numel) +
                    " elements");
  return static_cast<const double*>(t.const_data_ptr());
}

inline const double* small_gram_dd(const std::optional<Tensor>& gram_dd, const Layout& layout) {
  const int64_t k = layout.rows - 1;
  return gram_dd ? small(*gram_dd, layout.parts * k * k, "gram_dd") : nullptr;
}

// The plan of an op that writes row 0, refused if that row may not be written.
inline Plan plan_to_write(const Rows& rows) {
  Plan plan = make_plan(rows.buffers(), rows.layout());
  check_writable(rows.buffers(), rows.layout().rows);
  return plan;
}

}  // namespace gradproj::cpu

// Torch's side of an op: lists of tensors from the dispatcher, as the Buffers that plan.h works on. Stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "plan.h"
#include "weights.h"

namespace gradproj {

// The tensors of one `Tensor[]` or `Tensor?[]` argument. Owns a reference to each until it goes out of scope. It works on
// the raw handles: a shared_ptr per tensor would cost as much as everything else that a small buffer needs.
class TensorList {
 public:
  TensorList(StableListHandle list, bool optional) {
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      if (optional)
        handles_.push_back(torch::stable::detail::to<std::optional<AtenTensorHandle>>(item).value_or(nullptr));
      else
        handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (AtenTensorHandle h : handles_)
      if (h) aoti_torch_delete_tensor_object(h);
  }
  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }  // null: None

 private:
  std::vector<AtenTensorHandle> handles_;
};

struct Where {
  int32_t type = -1;
  int32_t index = -1;
};

// Appends the buffers of a list. All tensors must be strided, floating, and on one device, which is noted in `where`.
inline void append_buffers(const TensorList& list, std::vector<Buffer>& buffers, Where& where) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(), f16 = aoti_torch_dtype_float16(),
                       bf16 = aoti_torch_dtype_bfloat16(), strided = aoti_torch_layout_strided();
  for (size_t i = 0; i < list.size(); ++i) {
    buffers.emplace_back();
    const AtenTensorHandle h = list[i];
    if (!h) continue;
    Buffer& b = buffers.back();
    auto refuse = [&](const char* what) {
      throw PlanError("gradproj: buffer " + std::to_string(buffers.size() - 1) + ": " + what);
    };
    int32_t dtype, layout, type, index;
    int64_t ndim;
    int64_t *sizes, *strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(h, &layout));
    if (layout != strided) refuse("not a dense tensor");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(h, &dtype));
    if (dtype != f32 && dtype != f64 && dtype != f16 && dtype != bf16) refuse("dtype without a kernel");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(h, &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(h, &index));
    if (where.type < 0) where = {type, index};
    if (type != where.type || index != where.index) refuse("on another device than the first");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(h, &ndim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(h, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(h, &strides));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(h, &b.contiguous));
    b.sizes = sizes;
    b.strides = strides;
    b.ndim = static_cast<int32_t>(ndim);
    b.numel = 1;
    for (int32_t d = 0; d < b.ndim; ++d) b.numel *= sizes[d];
    b.dtype = dtype == f32 ? DType::f32 : dtype == f64 ? DType::f64 : dtype == f16 ? DType::f16 : DType::bf16;
    b.present = true;
    if (b.numel > 0) {
      void* data;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(h, &data));
      b.data = static_cast<const char*>(data);
      if (!data) refuse("has no memory");
    }
  }
}

inline Rule parse_rule(const std::string& method, double gamma, double eps) {
  if (method == "orthogonal") return {Method::orthogonal, gamma, eps};
  if (method == "conflict") return {Method::conflict, gamma, eps};
  if (method == "mix") return {Method::mix, gamma, eps};
  if (method == "pcgrad") return {Method::pcgrad, gamma, eps};
  throw PlanError("gradproj: unknown method " + method);
}

struct GramShape {
  int64_t parts;
  int rows;
};

// Of [rows, rows], or of one such matrix per part: [parts, rows, rows].
inline GramShape gram_shape(const torch::stable::Tensor& gram) {
  const int64_t ndim = gram.dim();
  if ((ndim != 2 && ndim != 3) || gram.size(ndim - 1) < 1 || gram.size(ndim - 2) != gram.size(ndim - 1))
    throw PlanError("gradproj: gram must have shape [rows, rows] or [parts, rows, rows]");
  return {ndim == 3 ? gram.size(0) : 1, static_cast<int>(gram.size(ndim - 1))};
}

// Rows of an op that takes gradients and directions: 1 + K.
inline int count_rows(size_t grads, size_t directions) {
  if (grads == 0 || directions % grads != 0) throw PlanError("gradproj: rows of different length");
  return 1 + static_cast<int>(directions / grads);
}

}  // namespace gradproj

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

// Null where there is no Python in the process.
extern "C" int PyGILState_Ensure() __attribute__((weak));
extern "C" void PyGILState_Release(int) __attribute__((weak));

namespace gradproj {

// References to the tensors of an op's lists, as raw handles: a shared_ptr per tensor would cost as much as everything
// else that a small buffer needs. Giving back the last one that C++ holds to a tensor that Python holds too takes the
// interpreter's lock. Held around all of them it is taken once, not once per tensor: 300 tensors of a row, 10 us.
struct References {
  std::vector<AtenTensorHandle> handles;  // null: None

  References() = default;
  References(const References&) = delete;
  References& operator=(const References&) = delete;
  ~References() {
    const int state = PyGILState_Ensure ? PyGILState_Ensure() : 0;
    for (AtenTensorHandle h : handles)
      if (h) aoti_torch_delete_tensor_object(h);
    if (PyGILState_Release) PyGILState_Release(state);
  }
};

struct Where {
  int32_t type = -1;
  int32_t index = -1;
};

// The buffer of a tensor, the `number`-th of a call: strided, floating, and on one device with the others, noted in
// `where`.
inline Buffer buffer_of(AtenTensorHandle h, size_t number, Where& where) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(), f16 = aoti_torch_dtype_float16(),
                       bf16 = aoti_torch_dtype_bfloat16();
  auto refuse = [&](const char* what) { throw PlanError("gradproj: buffer " + std::to_string(number) + ": " + what); };
  int32_t dtype, type, index;
  int64_t ndim;
  int64_t *sizes, *strides;
  Buffer b;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(h, &dtype));
  if (dtype != f32 && dtype != f64 && dtype != f16 && dtype != bf16) refuse("dtype without a kernel");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(h, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(h, &index));
  if (where.type < 0) where = {type, index};
  if (type != where.type || index != where.index) refuse("on another device than the first");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(h, &ndim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(h, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(h, &strides));  // fails for a tensor that is not strided
  b.sizes = sizes;
  b.strides = strides;
  b.ndim = static_cast<int32_t>(ndim);
  b.numel = 1;
  b.contiguous = true;
  for (int32_t d = b.ndim; d-- > 0;) {
    b.contiguous = b.contiguous && (sizes[d] == 1 || strides[d] == b.numel);
    b.numel *= sizes[d];
  }
  b.contiguous = b.contiguous || b.numel == 0;
  b.dtype = dtype == f32 ? DType::f32 : dtype == f64 ? DType::f64 : dtype == f16 ? DType::f16 : DType::bf16;
  b.present = true;
  if (b.numel > 0) {
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(h, &data));
    b.data = static_cast<const char*>(data);
    if (!data) refuse("has no memory");
  }
  return b;
}

// The part of every column; see python/gradproj/kernels/ops.py.
struct Parts {
  StableListHandle list;
  int64_t count;  // 0: all columns are one part, and results have no leading dimension
};

// The rows of one op call as plan.h wants them. Owns the tensors.
class Rows {
 public:
  // One list of all rows: a Gram.
  Rows(StableListHandle rows, int64_t num_rows, const Parts& parts) {
    add(rows, true);
    finish(num_rows, parts);
  }
  // Gradients and directions: an op that writes the gradients.
  Rows(StableListHandle grads, StableListHandle directions, const Parts& parts) {
    const size_t n = add(grads, false), rest = add(directions, true);
    if (n == 0 || rest % n != 0) throw PlanError("gradproj: rows of different length");
    finish(1 + static_cast<int64_t>(rest / n), parts);
  }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  const Layout& layout() const { return layout_; }
  const Where& where() const { return where_; }
  // [R] or [P, R]; [R, R] or [P, R, R].
  std::vector<int64_t> shape(int dims) const {
    std::vector<int64_t> s(static_cast<size_t>(dims), layout_.rows);
    if (batched_) s.insert(s.begin(), layout_.parts);
    return s;
  }

 private:
  // Appends the buffers of a list; how many they are.
  size_t add(StableListHandle list, bool optional) {
    using torch::stable::detail::to;
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    references_.handles.reserve(buffers_.size() + size);
    buffers_.reserve(buffers_.size() + size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      references_.handles.push_back(optional ? to<std::optional<AtenTensorHandle>>(item).value_or(nullptr)
                                             : to<AtenTensorHandle>(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));  // before a buffer may be refused
    for (size_t i = buffers_.size(); i < references_.handles.size(); ++i) {
      const AtenTensorHandle h = references_.handles[i];
      buffers_.push_back(h ? buffer_of(h, i, where_) : Buffer{});
    }
    return size;
  }
  void finish(int64_t num_rows, const Parts& parts) {
    if (num_rows < 1 || buffers_.size() % static_cast<size_t>(num_rows) != 0)
      throw PlanError("gradproj: rows of different length");
    layout_.rows = static_cast<int>(num_rows);
    size_t count = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(parts.list, &count));
    for (size_t i = 0; i < count; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(parts.list, i, &item));
      const int64_t part = torch::stable::detail::to<int64_t>(item);
      if (part < 0 || part >= parts.count || part > INT32_MAX)
        throw PlanError("gradproj: parts: a number is not below num_parts");
      layout_.part.push_back(static_cast<int32_t>(part));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(parts.list));
    if (parts.count < 0 || parts.count > INT32_MAX) throw PlanError("gradproj: num_parts out of range");
    batched_ = parts.count > 0;
    if (batched_ == layout_.part.empty() && !buffers_.empty()) throw PlanError("gradproj: parts and num_parts go together");
    layout_.parts = batched_ ? static_cast<int>(parts.count) : 1;
  }

  References references_;
  std::vector<Buffer> buffers_;
  Layout layout_{};
  Where where_;
  bool batched_ = false;
};

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

}  // namespace gradproj

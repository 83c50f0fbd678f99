// Torch's side of an op: lists of tensors from the dispatcher, as the Buffers that plan.h works on. Stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "overlap.h"

// Null where there is no Python in the process.
extern "C" int PyGILState_Ensure() __attribute__((weak));
extern "C" void PyGILState_Release(int) __attribute__((weak));

namespace gradproj {

// References to the tensors of an op's lists, as raw handles: a shared_ptr per tensor would cost as much as everything
// else that a small buffer needs. Dropping the last C++ reference to a tensor that Python holds takes the interpreter's
// lock, so the destructor takes it once, not once per tensor: 10 us for the 300 tensors of a row.
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

struct Place {
  int32_t type = -1, index = -1;  // of the device, as torch numbers them
  bool operator==(const Place&) const = default;
};

inline Place place_of(AtenTensorHandle h) {
  Place place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(h, &place.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(h, &place.index));
  return place;
}

// The buffer of a tensor, the `number`-th of a call. Refuses what is not strided or not of a dtype with kernels.
inline Buffer buffer_of(AtenTensorHandle h, size_t number) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(),
                       f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
  auto refuse = [&](const char* what) { throw PlanError("gradproj: buffer " + std::to_string(number) + ": " + what); };
  int32_t dtype;
  int64_t ndim, *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(h, &dtype));
  if (dtype != f32 && dtype != f64 && dtype != f16 && dtype != bf16) refuse("dtype without a kernel");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(h, &ndim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(h, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(h, &strides));  // fails for a tensor that is not strided
  Buffer b{.sizes = sizes, .strides = strides, .numel = 1, .contiguous = true, .present = true};
  b.ndim = static_cast<int32_t>(ndim);
  b.dtype = dtype == f32 ? DType::f32 : dtype == f64 ? DType::f64 : dtype == f16 ? DType::f16 : DType::bf16;
  for (int32_t d = b.ndim; d-- > 0;) {
    b.contiguous = b.contiguous && (sizes[d] == 1 || strides[d] == b.numel);
    b.numel *= sizes[d];
  }
  if (b.numel == 0) {
    b.contiguous = true;
    return b;
  }
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(h, &data));
  if (!data) refuse("has no memory");
  b.data = static_cast<const char*>(data);
  return b;
}

// The rows of one op call. Owns the tensors. part: of every column, below parts; none where there is one part.
class Rows {
 public:
  // Of an op that reads all rows, which come as one list.
  Rows(StableListHandle rows, int64_t num_rows, std::vector<int64_t> part, int64_t parts) {
    add(rows, true);
    set_layout(num_rows, std::move(part), parts);
  }
  // Of an op that writes the gradients.
  Rows(StableListHandle grads, StableListHandle directions, std::vector<int64_t> part, int64_t parts) {
    const size_t n = add(grads, false), rest = add(directions, true);
    if (n == 0 || rest % n != 0) throw PlanError("gradproj: rows of different length");
    set_layout(1 + static_cast<int64_t>(rest / n), std::move(part), parts);
  }
  Place place() const { return place_; }
  Plan plan_to_read() const { return make_plan(buffers_, layout_); }
  // Refuses a row 0 that may not be written.
  Plan plan_to_write() const {
    Plan plan = make_plan(buffers_, layout_);
    check_writable(buffers_, plan.rows);
    return plan;
  }
  // [R] or [P, R]; [R, R] or [P, R, R].
  std::vector<int64_t> shape(int dims) const {
    std::vector<int64_t> s(dims, layout_.rows);
    if (!layout_.part.empty()) s.insert(s.begin(), layout_.parts);
    return s;
  }

 private:
  // Appends the buffers of a list; returns how many they are.
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
      buffers_.push_back(h ? buffer_of(h, i) : Buffer{});
      if (!h) continue;
      if (place_ == Place{}) place_ = place_of(h);
      if (place_ != place_of(h))
        throw PlanError("gradproj: buffer " + std::to_string(i) + ": on another device than the first");
    }
    return size;
  }
  void set_layout(int64_t num_rows, std::vector<int64_t> part, int64_t parts) {
    if (parts < 0 || parts > INT32_MAX) throw PlanError("gradproj: num_parts out of range");
    if (place_ == Place{}) throw PlanError("gradproj: no tensor among the buffers");
    if ((parts > 0) == part.empty()) throw PlanError("gradproj: parts and num_parts go together");
    layout_ = {num_rows, std::move(part), std::max(1, static_cast<int>(parts))};
  }

  References references_;
  std::vector<Buffer> buffers_;
  Layout layout_{};
  Place place_;
};

}  // namespace gradproj

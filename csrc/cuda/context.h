// What the CUDA ops share: where a call runs, and its small tensors. Schemas and fakes: python/gradproj/kernels/ops.py.
#pragma once

#include <algorithm>
#include <mutex>

#include "../overlap.h"
#include "../tensors.h"
#include "launch.h"

namespace gradproj::cuda {

using torch::stable::Tensor;

// What the kernels have to know of a device, which must be one that they run on; without a stream. Asked once.
inline Device properties_of(int index) {
  static std::mutex mutex;
  static std::vector<Device> found;
  const std::lock_guard<std::mutex> lock(mutex);
  if (found.size() <= static_cast<size_t>(index)) found.resize(static_cast<size_t>(index) + 1, Device{});
  Device& device = found[static_cast<size_t>(index)];
  if (device.most_blocks == 0) {
    int processors = 0, major = 0, driver = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    if (major < 7 || driver < 12010)
      throw PlanError("gradproj: the CUDA kernels need compute capability 7.0 and a driver for CUDA 12.1 or later");
    // Four blocks of 256 threads fill a multiprocessor to the half that the kernels are compiled for.
    device.most_blocks = std::min<int64_t>(kMaxBlocks, 4 * processors);
    device.starts_early = major >= 9 && driver >= 12030;  // 12.3: in a captured graph too
  }
  return device;
}

inline double* data(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// The current stream of a device, which is made current for as long as this lives.
class Context {
 public:
  explicit Context(const Where& where) : guard_(where.index), index_(where.index) {
    if (where.type != aoti_torch_device_type_cuda()) throw PlanError("gradproj: the first buffer is not on a CUDA device");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.index, &stream));
    device = properties_of(where.index);
    device.stream = static_cast<cudaStream_t>(stream);
  }
  Tensor doubles(std::vector<int64_t> shape) const {
    return torch::stable::empty(shape, torch::headeronly::ScalarType::Double, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CUDA, index_));
  }
  // A small argument as the kernels read it.
  const double* small(const Tensor& t, int64_t numel, const char* name) const {
    if (!t.is_cuda() || t.get_device_index() != index_ || t.scalar_type() != torch::headeronly::ScalarType::Double ||
        t.numel() != numel || !t.is_contiguous())
      throw PlanError(std::string("gradproj: ") + name + " must be a contiguous float64 tensor of " + std::to_string(numel) +
                      " elements on the device of the buffers");
    return static_cast<const double*>(t.const_data_ptr());
  }
  const double* gram_dd(const std::optional<Tensor>& t, const Plan& plan) const {
    const int64_t k = plan.rows - 1;
    return t ? small(*t, plan.parts * k * k, "gram_dd") : nullptr;
  }
  Device device;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
};

// The plan of an op that writes row 0, refused if that row may not be written.
inline Plan plan_to_write(const Rows& rows) {
  Plan plan = make_plan(rows.buffers(), rows.layout());
  check_writable(rows.buffers(), rows.layout().rows);
  return plan;
}

}  // namespace gradproj::cuda

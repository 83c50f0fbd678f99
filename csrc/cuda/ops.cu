// The CUDA side of ../ops.h: the buffers' device, its current stream, and scratch.
#include "../ops.h"
#include "launch.h"

namespace gradproj::cuda {
namespace {

// What kernels have to know of a device; refuses one that they do not run on.
Device device_of(int index, void* stream) {
  int processors = 0, major = 0, driver = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (major < 7 || driver < 12010)
    throw PlanError("gradproj: the CUDA kernels need compute capability 7.0 and a driver for CUDA 12.1 or later");
  // Four blocks of 256 threads fill a multiprocessor to the half that the kernels are compiled for. Programmatic
  // dependent launch: 12.3, for it to work in a captured graph too.
  const int64_t blocks = std::min<int64_t>(kMaxBlocks, 4 * processors);
  return {static_cast<cudaStream_t>(stream), blocks, major >= 9 && driver >= 12030};
}

// The device is current for as long as this lives.
class Context {
 public:
  explicit Context(Place place) : guard_(place.index), place_(place) {
    if (place.type != aoti_torch_device_type_cuda())
      throw PlanError("gradproj: the first buffer is not on a CUDA device");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
    device_ = device_of(place.index, stream);
  }
  void gram(const Plan& plan, const double* gram_dd, double* gram) const {
    launch_gram(device_, plan, gram_dd, data(scratch(plan)), gram);
  }
  void weights(Rule rule, const double* gram, int64_t parts, int R, double* weights) const {
    launch_weights(device_, rule, gram, parts, R, weights);
  }
  void combine(const Plan& plan, const double* weights) const {
    launch_combine(device_, plan, {const_cast<double*>(weights)});
  }
  void project(const Plan& plan, Rule rule, const double* gram_dd, double* gram, double* weights) const {
    launch_project(device_, plan, rule, gram_dd, data(scratch(plan)), gram, weights);
  }

 private:
  // May be freed once everything is launched: the allocator hands it out again in the order of the stream.
  Tensor scratch(const Plan& plan) const { return new_doubles(place_, {gram_scratch(device_, plan)}); }

  torch::stable::accelerator::DeviceGuard guard_;
  Place place_;
  Device device_;
};

}  // namespace
}  // namespace gradproj::cuda

STABLE_TORCH_LIBRARY_IMPL(gradproj, CUDA, m) { gradproj::Ops<gradproj::cuda::Context>::implement(m); }

// The native ops for CUDA tensors: unpack, check, plan, launch on the current stream. Nothing here waits for the device.
// Schemas and fakes: python/gradproj/ops.py.
#include <algorithm>
#include <mutex>

#include "../overlap.h"
#include "../tensors.h"
#include "combine.cuh"
#include "weights.cuh"

namespace gradproj::cuda {
namespace {

using torch::stable::Tensor;

// What does not change about a device: read once.
struct Properties {
  int64_t most_blocks;
  bool large_params;
};

const Properties& properties(int index) {
  static std::mutex mutex;
  static std::vector<std::optional<Properties>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(index)) known.resize(static_cast<size_t>(index) + 1);
  auto& found = known[static_cast<size_t>(index)];
  if (!found) {
    int processors = 0, major = 0, driver = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    // Four blocks of 256 threads fill a multiprocessor to the half that the kernels are compiled for.
    found = Properties{std::min<int64_t>(kMaxBlocks, 4 * processors), major >= 7 && driver >= 12010};
  }
  return *found;
}

// Everything that a launch needs to know about where it runs, with the device made current.
class RunContext {
 public:
  explicit RunContext(const Where& where) : guard_(where.index), index_(where.index) {
    if (where.type != aoti_torch_device_type_cuda()) throw PlanError("gradproj: the first buffer is not on a CUDA device");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.index, &stream));
    const Properties& p = properties(where.index);
    device = {static_cast<cudaStream_t>(stream), p.most_blocks, p.large_params};
  }
  Tensor doubles(std::vector<int64_t> shape) const {
    return torch::stable::empty(shape, torch::headeronly::ScalarType::Double, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CUDA, index_));
  }
  int index() const { return index_; }
  Device device;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
};

double* data(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

const double* small(const RunContext& run, const Tensor& t, int64_t numel, const char* name) {
  if (!t.is_cuda() || t.get_device_index() != run.index() || t.scalar_type() != torch::headeronly::ScalarType::Double ||
      t.numel() != numel || !t.is_contiguous())
    throw PlanError(std::string("gradproj: ") + name + " must be a contiguous float64 tensor of " + std::to_string(numel) +
                    " elements on the device of the buffers");
  return static_cast<const double*>(t.const_data_ptr());
}

void check_rows(int rows) {
  if (rows > kMaxRows)
    throw PlanError("gradproj: " + std::to_string(rows - 1) + " directions; the CUDA kernels take up to 64");
}

// The Gram of `plan`, with the part that is known copied.
Tensor compute_gram(const RunContext& run, const Plan& plan, const std::optional<Tensor>& known) {
  const int R = plan.rows;
  const double* copied = known ? small(run, *known, int64_t{R - 1} * (R - 1), "known") : nullptr;
  Tensor gram = run.doubles({R, R}), scratch = run.doubles({gram_scratch(run.device)});
  launch_gram(run.device, plan, copied != nullptr, data(scratch), data(gram));
  if (copied && R > 1) {
    const size_t row = sizeof(double) * static_cast<size_t>(R - 1);
    check(cudaMemcpy2DAsync(data(gram) + R + 1, row + sizeof(double), copied, row, row, static_cast<size_t>(R - 1),
                            cudaMemcpyDeviceToDevice, run.device.stream),
          "copy of the known Gram");
  }
  return gram;
}

Tensor gram_op(StableListHandle list, int64_t num_rows, std::optional<Tensor> known) {
  const TensorList tensors(list, true);
  std::vector<Buffer> buffers;
  buffers.reserve(tensors.size());
  Where where;
  append_buffers(tensors, buffers, where);
  check_rows(static_cast<int>(num_rows));
  const Plan plan = make_plan(buffers, static_cast<int>(num_rows));
  return compute_gram(RunContext(where), plan, known);
}

Tensor weights_op(Tensor gram, std::string method, double gamma, double eps) {
  const auto [parts, rows] = gram_shape(gram);
  check_rows(rows);
  const RunContext run({aoti_torch_device_type_cuda(), gram.get_device_index()});
  Tensor weights = gram.dim() == 2 ? run.doubles({rows}) : run.doubles({parts, rows});
  launch_weights(run.device.stream, parse_rule(method, gamma, eps), small(run, gram, parts * rows * rows, "gram"), parts, rows,
                 data(weights));
  return weights;
}

struct Written {
  Plan plan;
  Where where;
};

// The plan of an op that writes its first list, refused if that list may not be written.
Written plan_to_write(const TensorList& grads, const TensorList& directions) {
  std::vector<Buffer> buffers;
  buffers.reserve(grads.size() + directions.size());
  Written w;
  append_buffers(grads, buffers, w.where);
  append_buffers(directions, buffers, w.where);
  const int rows = count_rows(grads.size(), directions.size());
  check_rows(rows);
  w.plan = make_plan(buffers, rows);
  check_writable(buffers, rows);
  return w;
}

void combine_op(StableListHandle grad_list, StableListHandle direction_list, Tensor weights) {
  const TensorList grads(grad_list, false), directions(direction_list, true);
  const Written w = plan_to_write(grads, directions);
  const RunContext run(w.where);
  WeightSource source{};
  source.weights = const_cast<double*>(small(run, weights, w.plan.rows, "weights"));
  launch_combine(run.device, w.plan, source);
}

std::tuple<Tensor, Tensor> project_op(StableListHandle grad_list, StableListHandle direction_list, std::string method,
                                      double gamma, double eps, std::optional<Tensor> known) {
  const TensorList grads(grad_list, false), directions(direction_list, true);
  const Rule rule = parse_rule(method, gamma, eps);
  const Written w = plan_to_write(grads, directions);
  const RunContext run(w.where);
  if (w.plan.rows == 2 && !known && !w.plan.pieces.empty()) {
    Tensor gram = run.doubles({2, 2}), weights = run.doubles({2}), scratch = run.doubles({gram_scratch(run.device)});
    launch_project_one(run.device, w.plan, rule, data(scratch), data(gram), data(weights));
    return {gram, weights};
  }
  Tensor gram = compute_gram(run, w.plan, known);
  Tensor weights = run.doubles({w.plan.rows});
  launch_weights(run.device.stream, rule, data(gram), 1, w.plan.rows, data(weights));
  WeightSource source{};
  source.weights = data(weights);
  launch_combine(run.device, w.plan, source);
  return {gram, weights};
}

}  // namespace
}  // namespace gradproj::cuda

STABLE_TORCH_LIBRARY_IMPL(gradproj, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gradproj::cuda::gram_op));
  m.impl("weights", TORCH_BOX(&gradproj::cuda::weights_op));
  m.impl("combine_", TORCH_BOX(&gradproj::cuda::combine_op));
  m.impl("project_", TORCH_BOX(&gradproj::cuda::project_op));
}

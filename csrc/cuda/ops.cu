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
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.index, &stream));
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

const double* known_gram(const RunContext& run, const std::optional<Tensor>& known, const Rows& rows) {
  const int64_t k = rows.gram_rows() - 1;
  return known ? small(run, *known, rows.layout().parts * k * k, "known") : nullptr;
}

Tensor compute_gram(const RunContext& run, const Rows& rows, const Plan& plan, const double* known) {
  Tensor gram = run.doubles(rows.shape(2)), scratch = run.doubles({gram_scratch(run.device, plan)});
  launch_gram(run.device, plan, known, data(scratch), data(gram));
  return gram;
}

Tensor gram_op(StableListHandle list, int64_t num_rows, std::optional<Tensor> known, std::optional<StableListHandle> base,
               std::optional<StableListHandle> scales, StableListHandle parts, int64_t num_parts) {
  const Rows rows(list, num_rows, {base, scales, parts, num_parts});
  const Plan plan = make_plan(rows.buffers(), rows.layout());
  const RunContext run(rows.where());
  return compute_gram(run, rows, plan, known_gram(run, known, rows));
}

Tensor weights_op(Tensor gram, std::string method, double gamma, double eps) {
  const auto [parts, rows] = gram_shape(gram);
  if (rows > kMaxRows)
    throw PlanError("gradproj: " + std::to_string(rows - 1) + " directions; the CUDA kernels take up to " +
                    std::to_string(kMaxRows - 1));
  const RunContext run({aoti_torch_device_type_cuda(), gram.get_device_index()});
  Tensor weights = gram.dim() == 2 ? run.doubles({rows}) : run.doubles({parts, rows});
  launch_weights(run.device.stream, parse_rule(method, gamma, eps), small(run, gram, parts * rows * rows, "gram"), parts, rows,
                 data(weights));
  return weights;
}

// The plan of an op that writes row 0, refused if that row may not be written.
Plan plan_to_write(const Rows& rows) {
  Plan plan = make_plan(rows.buffers(), rows.layout());
  check_writable(rows.buffers(), rows.layout().rows);
  return plan;
}

void combine_op(StableListHandle grads, StableListHandle directions, Tensor weights, std::optional<StableListHandle> base,
                std::optional<StableListHandle> scales, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {base, scales, parts, num_parts});
  const Plan plan = plan_to_write(rows);
  const RunContext run(rows.where());
  launch_combine(run.device, plan, small(run, weights, int64_t{plan.parts} * plan.gram_rows(), "weights"));
}

std::tuple<Tensor, Tensor> project_op(StableListHandle grads, StableListHandle directions, std::string method, double gamma,
                                      double eps, std::optional<Tensor> known, std::optional<StableListHandle> base,
                                      std::optional<StableListHandle> scales, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {base, scales, parts, num_parts});
  const Rule rule = parse_rule(method, gamma, eps);
  const Plan plan = plan_to_write(rows);
  const RunContext run(rows.where());
  const double* copied = known_gram(run, known, rows);
  Tensor weights = run.doubles(rows.shape(1));
  if (plan.gram_rows() == 2 && plan.parts == 1 && !copied && !plan.pieces.empty()) {
    Tensor gram = run.doubles(rows.shape(2)), scratch = run.doubles({gram_scratch(run.device, plan)});
    launch_project_one(run.device, plan, rule, data(scratch), data(gram), data(weights));
    return {gram, weights};
  }
  Tensor gram = compute_gram(run, rows, plan, copied);
  launch_weights(run.device.stream, rule, data(gram), plan.parts, plan.gram_rows(), data(weights));
  launch_combine(run.device, plan, data(weights));
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

// Chooses and launches the instances of combine.cuh. Included by combine.cu and by whatever runs the kernels in its place.
#pragma once

#include "combine.cuh"

namespace gradproj::cuda {
namespace {

// As launch_bucket of gram_launch.cuh chooses.
template <int kBytes>
void launch_combine_bucket(const Device& device, const Bucket& bucket, const Segments<kBytes>& s, bool wide,
                           const WeightSource& source, dim3 grid) {
  const bool uniform = bucket.uniform() && !s.parts;
  if (wide) {
    if (uniform && bucket.dtypes[0] == DType::f64)
      GRADPROJ_LAUNCH((combine_dense<double, Uniform<double>, kBytes>), grid, device.stream, s, source);
    else
      GRADPROJ_LAUNCH((combine_dense<double, Mixed<double>, kBytes>), grid, device.stream, s, source);
  } else if (!uniform) {
    GRADPROJ_LAUNCH((combine_dense<float, Mixed<float>, kBytes>), grid, device.stream, s, source);
  } else if (bucket.dtypes[0] == DType::f32) {
    GRADPROJ_LAUNCH((combine_dense<float, Uniform<float>, kBytes>), grid, device.stream, s, source);
  } else if (bucket.dtypes[0] == DType::f16) {
    GRADPROJ_LAUNCH((combine_dense<float, Uniform<F16>, kBytes>), grid, device.stream, s, source);
  } else {
    GRADPROJ_LAUNCH((combine_dense<float, Uniform<BF16>, kBytes>), grid, device.stream, s, source);
  }
}

template <int kBuffers>
void launch_combine_strided(const Device& device, const StridedPiece<kBuffers>& s, bool wide, const WeightSource& source) {
  const dim3 grid(static_cast<unsigned>(blocks_for((s.numel + kGranule - 1) / kGranule, device.most_blocks)));
  if (wide)
    GRADPROJ_LAUNCH((combine_strided<double, kBuffers>), grid, device.stream, s, source);
  else
    GRADPROJ_LAUNCH((combine_strided<float, kBuffers>), grid, device.stream, s, source);
}

void launch_all(const Device& device, const Plan& plan, const WeightSource& source) {
  check_launchable(plan, device.large_params);
  std::vector<int> all(static_cast<size_t>(source.R));
  std::iota(all.begin(), all.end(), 0);
  for (const Bucket& bucket : make_buckets(plan, all))
    for_each_launch(plan, bucket, device.large_params, [&]<int kBytes>(Segments<kBytes>& s, uint32_t granules) {
      const int64_t blocks = blocks_for(granules, device.most_blocks);
      s.chunk = chunk_for(granules, blocks);
      launch_combine_bucket(device, bucket, s, plan.any_f64, source, dim3(static_cast<unsigned>(blocks)));
    });
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    if (plan.pieces[p].ndim == 0) continue;
    if (plan.rows <= kFewBuffers)
      launch_combine_strided(device, make_strided<kFewBuffers>(plan, p, all), plan.any_f64, source);
    else
      launch_combine_strided(device, make_strided<kMaxBuffers>(plan, p, all), plan.any_f64, source);
  }
}

}  // namespace

void launch_combine(const Device& device, const Plan& plan, const double* weights) {
  WeightSource source{};
  source.weights = const_cast<double*>(weights);  // read only, without slots
  source.R = plan.gram_rows();
  launch_all(device, plan, source);
}

void launch_project_one(const Device& device, const Plan& plan, Rule rule, double* scratch, double* gram, double* weights) {
  check_launchable(plan, device.large_params);
  const int64_t slots = launch_pass(device, plan, {0, 1}, false, scratch, nullptr);
  launch_all(device, plan, {weights, scratch, gram, rule, static_cast<int32_t>(slots), 2});
}

}  // namespace gradproj::cuda

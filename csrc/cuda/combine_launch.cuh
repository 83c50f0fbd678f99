// Chooses and launches the instances of combine.cuh. Included by combine.cu and by whatever runs the kernels in its place.
#pragma once

#include "combine.cuh"

namespace gradproj::cuda {
namespace {

template <int kBytes>
void launch_combine_bucket(const Device& device, const Bucket& bucket, const Segments<kBytes>& s, bool wide,
                           const WeightSource& source, dim3 grid) {
  if (wide) {
    if (uniform(bucket.dtypes) && bucket.dtypes[0] == DType::f64)
      GRADPROJ_LAUNCH((combine_dense<double, Uniform<double>, kBytes>), grid, device.stream, s, source);
    else
      GRADPROJ_LAUNCH((combine_dense<double, Mixed<double>, kBytes>), grid, device.stream, s, source);
  } else if (!uniform(bucket.dtypes)) {
    GRADPROJ_LAUNCH((combine_dense<float, Mixed<float>, kBytes>), grid, device.stream, s, source);
  } else if (bucket.dtypes[0] == DType::f32) {
    GRADPROJ_LAUNCH((combine_dense<float, Uniform<float>, kBytes>), grid, device.stream, s, source);
  } else if (bucket.dtypes[0] == DType::f16) {
    GRADPROJ_LAUNCH((combine_dense<float, Uniform<F16>, kBytes>), grid, device.stream, s, source);
  } else {
    GRADPROJ_LAUNCH((combine_dense<float, Uniform<BF16>, kBytes>), grid, device.stream, s, source);
  }
}

}  // namespace

void launch_combine(const Device& device, const Plan& plan, const WeightSource& source) {
  std::vector<int> all(static_cast<size_t>(plan.rows));
  std::iota(all.begin(), all.end(), 0);
  // Strided pieces first: what is refused is refused before anything is written.
  std::vector<StridedPiece> strided;
  for (size_t p = 0; p < plan.pieces.size(); ++p)
    if (plan.pieces[p].ndim > 0) strided.push_back(make_strided(plan, p, all));
  for (const Bucket& bucket : make_buckets(plan, all)) {
    auto run = [&](auto& s, uint32_t granules) {
      const int64_t blocks = blocks_for(granules, device.most_blocks);
      s.chunk = chunk_for(granules, blocks);
      launch_combine_bucket(device, bucket, s, plan.any_f64, source, dim3(static_cast<unsigned>(blocks)));
    };
    const bool small = static_cast<int>(bucket.pieces.size()) <= SmallSegments::capacity(static_cast<int>(bucket.rows.size()));
    if (small || !device.large_params)
      for_each_batch<4096>(plan, bucket, kMaxGranules, run);
    else
      for_each_batch<32764>(plan, bucket, kMaxGranules, run);
  }
  for (const StridedPiece& s : strided) {
    const dim3 grid(static_cast<unsigned>(blocks_for((s.numel + kGranule - 1) / kGranule, device.most_blocks)));
    if (plan.any_f64)
      GRADPROJ_LAUNCH(combine_strided<double>, grid, device.stream, s, source);
    else
      GRADPROJ_LAUNCH(combine_strided<float>, grid, device.stream, s, source);
  }
}

void launch_project_one(const Device& device, const Plan& plan, Rule rule, double* scratch, double* gram, double* weights) {
  const int64_t slots = launch_pass(device, plan, {0, 1}, false, scratch);
  launch_combine(device, plan, {weights, scratch, slots, gram, rule});
}

}  // namespace gradproj::cuda

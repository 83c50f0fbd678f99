// Chooses and launches the instances of gram.cuh. Included by gram.cu and by whatever runs the kernels in its place.
#pragma once

#include "gram.cuh"

namespace gradproj::cuda {
namespace {

template <typename C, typename Access, int kBytes>
void launch_dense(const Device& device, const Segments<kBytes>& s, const Slots& slots, int64_t blocks) {
  const dim3 grid(static_cast<unsigned>(blocks));
  if (slots.row_only) {
    GRADPROJ_LAUNCH((gram_dense<C, typename Access::ForRow, kPassRows, true, kBytes>), grid, device.stream, s, slots);
  } else if (s.rows <= 2) {
    GRADPROJ_LAUNCH((gram_dense<C, Access, 2, false, kBytes>), grid, device.stream, s, slots);
  } else {
    if constexpr (!Access::kMixed)
      if (s.rows <= 5) {
        GRADPROJ_LAUNCH((gram_dense<C, Access, 5, false, kBytes>), grid, device.stream, s, slots);
        return;
      }
    GRADPROJ_LAUNCH((gram_dense<C, typename Access::ForPairs, kPassRows, false, kBytes>), grid, device.stream, s, slots);
  }
}

// Float8, a base and parts are decided at run time in the instances for mixed rows; where none of them is, nothing is asked.
template <typename C, int kBytes>
void launch_bucket(const Device& device, const Bucket& bucket, const Segments<kBytes>& s, const Slots& slots, int64_t blocks) {
  const bool uniform = bucket.uniform() && !s.parts;
  if constexpr (sizeof(C) == 8) {
    if (uniform && bucket.dtypes[0] == DType::f64)
      launch_dense<double, Uniform<double>>(device, s, slots, blocks);
    else
      launch_dense<double, Mixed<double>>(device, s, slots, blocks);
  } else {
    if (!uniform) return launch_dense<float, Mixed<float>>(device, s, slots, blocks);
    switch (bucket.dtypes[0]) {
      case DType::f32: return launch_dense<float, Uniform<float>>(device, s, slots, blocks);
      case DType::f16: return launch_dense<float, Uniform<F16>>(device, s, slots, blocks);
      default: return launch_dense<float, Uniform<BF16>>(device, s, slots, blocks);
    }
  }
}

}  // namespace

template <typename C>
int64_t launch_pass(const Device& device, const Plan& plan, const std::vector<int>& wanted, bool row_only, double* partial,
                    const Target* target) {
  const int width = static_cast<int>(wanted.size());
  auto counts = [&](int first_id) { return !row_only || first_id == 0; };  // else it has no product with the pass's row 0
  Slots slots{partial, width, row_only ? width : width * (width + 1) / 2, row_only, true, {}};
  std::copy_n(wanted.begin(), std::min(width, kPassRows), slots.row);
  int64_t elements = 0;
  for (const Piece& piece : plan.pieces) elements += piece.numel;
  const int64_t blocks = blocks_for((elements + kGranule - 1) / kGranule, device.most_blocks);
  const bool several = plan.parts > 1;
  Target into = target ? *target : Target{};
  auto launched = [&] {  // one part: the next launch adds to the slots; several: to the target
    if (several) {
      into.known = nullptr;
      into.add = true;
    } else {
      slots.fresh = false;
    }
  };

  for (const Bucket& bucket : make_buckets(plan, wanted)) {
    if (!counts(bucket.ids[0])) continue;
    for_each_launch(plan, bucket, device.large_params, [&]<int kBytes>(Segments<kBytes>& s, uint32_t granules) {
      const int64_t most = several ? std::min<int64_t>(device.most_blocks, granules) : blocks;
      s.chunk = chunk_for(granules, most);
      s.per_block = static_cast<uint32_t>((granules + most - 1) / most);
      // Slots of several parts are no place for a block that has no granules.
      launch_bucket<C>(device, bucket, s, slots, several ? (granules + s.per_block - 1) / s.per_block : most);
      if (several) {  // all parts the first time, for those that no launch has; then those of the launch
        const int32_t begin = into.add ? s.part(0) : 0, end = into.add ? s.part(s.count - 1) + 1 : plan.parts;
        GRADPROJ_LAUNCH(gram_finish_parts<kBytes>, dim3(static_cast<unsigned>(end - begin)), device.stream, s, slots, begin, into);
      }
      launched();
    });
  }
  if (several && !into.add) {  // zeros, for strided pieces to add to
    GRADPROJ_LAUNCH((gram_finish<>), dim3(static_cast<unsigned>(plan.parts)), device.stream, slots, 0, into);
    launched();
  }
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    if (plan.pieces[p].ndim == 0) continue;
    const SmallStrided s = make_strided<kFewBuffers>(plan, p, wanted);
    if (s.rows == 0 || !counts(s.info.id[0])) continue;
    const dim3 grid(static_cast<unsigned>(blocks));
    if (row_only)
      GRADPROJ_LAUNCH((gram_strided<C, true>), grid, device.stream, s, slots);
    else
      GRADPROJ_LAUNCH((gram_strided<C, false>), grid, device.stream, s, slots);
    if (several) {
      Target part = into;
      part.gram += int64_t{s.part} * into.R * into.R;
      GRADPROJ_LAUNCH((gram_finish<>), dim3(1), device.stream, slots, blocks, part);
    }
    launched();
  }
  const int64_t count = slots.fresh ? 0 : blocks;
  if (target && !several) GRADPROJ_LAUNCH((gram_finish<>), dim3(1), device.stream, slots, count, into);
  return count;
}

template int64_t launch_pass<float>(const Device&, const Plan&, const std::vector<int>&, bool, double*, const Target*);
template int64_t launch_pass<double>(const Device&, const Plan&, const std::vector<int>&, bool, double*, const Target*);

void launch_gram(const Device& device, const Plan& plan, const double* known, double* scratch, double* gram) {
  check_launchable(plan, device.large_params);
  const int R = plan.gram_rows();
  Target target{gram, known, R, false};
  if (!known && R <= kPassRows) {
    std::vector<int> all(static_cast<size_t>(R));
    std::iota(all.begin(), all.end(), 0);
    launch_pass(device, plan, all, false, scratch, &target);
    return;
  }
  for (int i = 0; i < (known ? 1 : R); ++i) {
    int j = i + 1;
    do {  // row i with itself and up to eight rows behind it
      std::vector<int> wanted{i};
      for (; j < R && static_cast<int>(wanted.size()) < kPassRows; ++j) wanted.push_back(j);
      launch_pass(device, plan, wanted, true, scratch, &target);
      target.known = nullptr;  // copied by the first pass
    } while (j < R);
  }
}

}  // namespace gradproj::cuda

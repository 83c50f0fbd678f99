// Chooses and launches the instances of gram.cuh. Included by gram.cu and by whatever runs the kernels in its place.
#pragma once

#include "gram.cuh"

namespace gradproj::cuda {
namespace {

template <typename C, typename Access, int kBytes>
void launch_dense(const Device& device, const Segments<kBytes>& s, const Slots& slots, int64_t blocks) {
  const dim3 grid(static_cast<unsigned>(blocks));
  if (slots.row_only) {
    GRADPROJ_LAUNCH((gram_dense<C, typename Access::ForManyRows, kPassRows, true, kBytes>), grid, device.stream, s, slots);
  } else if (s.rows <= 2) {
    GRADPROJ_LAUNCH((gram_dense<C, Access, 2, false, kBytes>), grid, device.stream, s, slots);
  } else {
    if constexpr (!Access::kMixed)
      if (s.rows <= 5) {
        GRADPROJ_LAUNCH((gram_dense<C, Access, 5, false, kBytes>), grid, device.stream, s, slots);
        return;
      }
    GRADPROJ_LAUNCH((gram_dense<C, typename Access::ForManyRows, kPassRows, false, kBytes>), grid, device.stream, s, slots);
  }
}

template <typename C, int kBytes>
void launch_bucket(const Device& device, const Bucket& bucket, const Segments<kBytes>& s, const Slots& slots, int64_t blocks) {
  if constexpr (sizeof(C) == 8) {
    if (uniform(bucket.dtypes) && bucket.dtypes[0] == DType::f64)
      launch_dense<double, Uniform<double>>(device, s, slots, blocks);
    else
      launch_dense<double, Mixed<double>>(device, s, slots, blocks);
  } else {
    if (!uniform(bucket.dtypes)) return launch_dense<float, Mixed<float>>(device, s, slots, blocks);
    switch (bucket.dtypes[0]) {
      case DType::f32: return launch_dense<float, Uniform<float>>(device, s, slots, blocks);
      case DType::f16: return launch_dense<float, Uniform<F16>>(device, s, slots, blocks);
      default: return launch_dense<float, Uniform<BF16>>(device, s, slots, blocks);
    }
  }
}

}  // namespace

template <typename C>
int64_t launch_pass(const Device& device, const Plan& plan, const std::vector<int>& wanted, bool row_only, double* partial) {
  const int width = static_cast<int>(wanted.size());
  const std::vector<Bucket> buckets = make_buckets(plan, wanted);
  // A bucket without the pass's row 0 has no product with it.
  auto counts = [&](const std::vector<int>& rows) { return !row_only || (!rows.empty() && rows[0] == wanted[0]); };
  auto positions = [&](RowInfo& info, int rows) {
    for (int r = 0; r < rows; ++r)
      info.id[r] = static_cast<uint8_t>(std::find(wanted.begin(), wanted.end(), int{info.id[r]}) - wanted.begin());
  };

  int64_t elements = 0;
  for (const Piece& piece : plan.pieces) elements += piece.numel;
  const int64_t blocks = blocks_for((elements + kGranule - 1) / kGranule, device.most_blocks);
  Slots slots{partial, width, row_only ? width : width * (width + 1) / 2, row_only, true};
  for (const Bucket& bucket : buckets) {
    if (!counts(bucket.rows)) continue;
    auto run = [&](auto& s, uint32_t granules) {
      positions(s.info, s.rows);
      s.chunk = chunk_for(granules, blocks);
      launch_bucket<C>(device, bucket, s, slots, blocks);
      slots.fresh = false;
      for (int r = 0; r < s.rows; ++r) s.info.id[r] = static_cast<uint8_t>(bucket.rows[static_cast<size_t>(r)]);
    };
    const bool small = static_cast<int>(bucket.pieces.size()) <= SmallSegments::capacity(static_cast<int>(bucket.rows.size()));
    if (small || !device.large_params)
      for_each_batch<4096>(plan, bucket, kMaxGranules, run);
    else
      for_each_batch<32764>(plan, bucket, kMaxGranules, run);
  }
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    if (plan.pieces[p].ndim == 0) continue;
    StridedPiece s = make_strided(plan, p, wanted);
    std::vector<int> present(s.info.id, s.info.id + s.rows);
    if (s.rows == 0 || !counts(present)) continue;
    positions(s.info, s.rows);
    const dim3 grid(static_cast<unsigned>(blocks));
    if (row_only)
      GRADPROJ_LAUNCH((gram_strided<C, true>), grid, device.stream, s, slots);
    else
      GRADPROJ_LAUNCH((gram_strided<C, false>), grid, device.stream, s, slots);
    slots.fresh = false;
  }
  return slots.fresh ? 0 : blocks;
}

template int64_t launch_pass<float>(const Device&, const Plan&, const std::vector<int>&, bool, double*);
template int64_t launch_pass<double>(const Device&, const Plan&, const std::vector<int>&, bool, double*);

void launch_gram(const Device& device, const Plan& plan, bool row_only, double* scratch, double* gram) {
  auto pass = [&](const std::vector<int>& wanted, bool only) {
    const int64_t count = launch_pass(device, plan, wanted, only, scratch);
    const int width = static_cast<int>(wanted.size());
    const Slots slots{scratch, width, only ? width : width * (width + 1) / 2, only, false};
    RowInfo ids{};
    for (int r = 0; r < width; ++r) ids.id[r] = static_cast<uint8_t>(wanted[static_cast<size_t>(r)]);
    GRADPROJ_LAUNCH((gram_finish<>), dim3(1), device.stream, slots, count, ids, gram, plan.rows);
  };
  if (!row_only && plan.rows <= kPassRows) {
    std::vector<int> all(static_cast<size_t>(plan.rows));
    std::iota(all.begin(), all.end(), 0);
    return pass(all, false);
  }
  for (int i = 0; i < (row_only ? 1 : plan.rows); ++i) {
    int j = i + 1;
    do {  // row i with itself and up to eight rows behind it
      std::vector<int> wanted{i};
      for (; j < plan.rows && static_cast<int>(wanted.size()) < kPassRows; ++j) wanted.push_back(j);
      pass(wanted, true);
    } while (j < plan.rows);
  }
}

}  // namespace gradproj::cuda

// From a plan to launches, on the host: sorts its segments by kernel instance and fills kernel parameters.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"
#include "segments.cuh"

namespace gradproj::cuda {

// The rows that a launch takes: `heads` rows from `first` on and those from `second` on, `count` in all. needs_first:
// every result involves the first of them; segments that lack it are skipped.
struct Pass {
  int32_t first, heads, second, count;
  bool needs_first;

  __host__ __device__ int32_t row(int r) const { return r < heads ? first + r : second + r - heads; }
};

// Row 0 and `count` - 1 others.
inline Pass row_0_and(int32_t second, int32_t count, bool needs_first) { return {0, 1, second, count, needs_first}; }

// The pairs of types that kernels are compiled for: what row 0 of a pass stores, and what all its other rows store.
constexpr DType kPairs[][2] = {{DType::f32, DType::f32},   {DType::f64, DType::f64}, {DType::f16, DType::f16},
                               {DType::bf16, DType::bf16}, {DType::f32, DType::f16}, {DType::f32, DType::bf16}};
constexpr int kElementwise = std::size(kPairs), kAbsent = -1;  // instead of the number of a pair

template <typename G, typename D>
struct Types {};

// f(Types<G, D>) for a pair.
template <typename F>
void with_types(int pair, const F& f) {
  switch (pair) {
    case 0: return f(Types<float, float>{});
    case 1: return f(Types<double, double>{});
    case 2: return f(Types<__half, __half>{});
    case 3: return f(Types<__nv_bfloat16, __nv_bfloat16>{});
    case 4: return f(Types<float, __half>{});
    case 5: return f(Types<float, __nv_bfloat16>{});
  }
}

// The pair that the rows of a segment are, or one of the two numbers instead.
inline int pair_of_segment(const Plan& plan, size_t segment, const Pass& pass) {
  const RowView* views = plan.row_views(segment);
  const RowView *first = &views[pass.first], *other = nullptr;  // other: the first one present after it
  bool mixed = plan.segments[segment].ndim > 0;
  for (int r = 1; r < pass.count; ++r) {
    const RowView& view = views[pass.row(r)];
    if (!view.data) continue;
    if (!other) other = &view;
    mixed = mixed || view.dtype != other->dtype;
  }
  if (!first->data && (pass.needs_first || !other)) return kAbsent;
  if (!first->data) first = other;
  if (!other) other = first;
  for (int pair = 0; pair < kElementwise && !mixed; ++pair)
    if (kPairs[pair][0] == first->dtype && kPairs[pair][1] == other->dtype) return pair;
  return kElementwise;
}

// Refuses what no kernel takes.
inline void check_launchable(const Plan& plan) {
  check_rows(plan.rows);
  for (const auto& segment : plan.segments)
    if (segment.ndim > kMaxDims)
      throw PlanError("gradproj: a buffer of " + std::to_string(segment.numel) + " elements needs " +
                      std::to_string(segment.ndim) + " dimensions after merging; the CUDA kernels take " +
                      std::to_string(kMaxDims) + ": make it contiguous");
}

constexpr int kMostOfALane = 48;  // elements of a chunk: so many float32 products are added up before they are widened

// Positions of a chunk: 1,536, or fewer where the warps of a full grid would not all get the same number of chunks.
inline int32_t chunk_for(const Device& device, int64_t elements) {
  constexpr int64_t most = 32 * kMostOfALane, unit = 256;  // unit: a step of the narrowest type
  const int64_t warps = device.most_blocks * kWarps;
  const int64_t rounds = std::max<int64_t>(1, (elements + warps * most - 1) / (warps * most));
  const int64_t even = (elements + warps * rounds - 1) / (warps * rounds);
  return static_cast<int32_t>(std::clamp((even + unit - 1) / unit * unit, unit, most));
}

inline bool full(const Segments& p) { return p.count == kMostSegments || (p.count + 1) * p.rows > kMostAddresses; }

// 2^31 chunks are more than any device holds: either a plan is small, or there are 1,536 elements to a chunk.
inline void append(Segments& p, const Plan& plan, size_t s, const Pass& pass) {
  const auto& segment = plan.segments[s];
  const RowView* views = plan.row_views(s);
  for (int r = 0; r < p.rows; ++r) p.address[p.count * p.rows + r] = views[pass.row(r)].data;
  const RowView& leading = views[pass.first];
  const int64_t positions = segment.numel + lead_of(leading.data, element_size(leading.dtype));
  p.numel[p.count] = segment.numel;
  p.part[p.count] = segment.part;
  p.end[p.count] = p.begin(p.count) + static_cast<int32_t>((positions + p.chunk - 1) / p.chunk);
  ++p.count;
}

// Divides the chunks among blocks, whose number it returns: as many as have a chunk for every warp, or, where each
// chunk may be of another part, as there are chunks; no more than the device's.
inline int64_t divide(Segments& p, const Device& device, bool several_parts) {
  const int64_t chunks = p.chunks(), wanted = several_parts ? chunks : (chunks + kWarps - 1) / kWarps;
  const int64_t most = std::min(device.most_blocks, wanted);
  p.per_block = static_cast<int32_t>((chunks + most - 1) / most);
  return (chunks + p.per_block - 1) / p.per_block;
}

inline StridedSegment make_strided(const Plan& plan, size_t s, const Pass& pass) {
  const auto& segment = plan.segments[s];
  StridedSegment p{};
  p.numel = segment.numel;
  p.ndim = std::max(1, segment.ndim);
  p.rows = pass.count;
  p.part = segment.part;
  for (int d = 0; d < p.ndim; ++d) {
    p.sizes[d] = segment.ndim ? plan.sizes(segment)[d] : segment.numel;
    p.inverse[d] = 1.0 / static_cast<double>(p.sizes[d]);
  }
  for (int r = 0; r < pass.count; ++r) {
    const RowView& view = plan.row_views(s)[pass.row(r)];
    for (int d = 0; d < p.ndim; ++d) p.strides[r][d] = segment.ndim ? plan.strides(segment, pass.row(r))[d] : 1;
    p.address[r] = view.data;
    p.dtype[r] = view.dtype;
  }
  return p;
}

// Calls dense(Types<G, D>, Segments, blocks) or strided(StridedSegment, blocks) for every launch of a pass, in a fixed
// order.
template <typename Dense, typename Strided>
void for_each_launch(const Device& device, const Plan& plan, const Pass& pass, const Dense& dense,
                     const Strided& strided) {
  std::vector<int> pairs;
  int64_t elements = 0;
  for (size_t s = 0; s < plan.segments.size(); ++s) {
    pairs.push_back(pair_of_segment(plan, s, pass));
    if (pairs.back() != kElementwise) elements += plan.segments[s].numel;
  }
  Segments p;  // filled for one launch after the other
  p.rows = pass.count;
  p.chunk = chunk_for(device, elements);
  for (int pair = 0; pair < kElementwise; ++pair) {
    p.count = 0;
    auto launch_these = [&] {
      if (p.count == 0) return;
      const int64_t blocks = divide(p, device, plan.parts > 1);
      with_types(pair, [&](auto types) { dense(types, p, blocks); });
      p.count = 0;
    };
    for (size_t s = 0; s < pairs.size(); ++s) {
      if (pairs[s] != pair) continue;
      if (full(p)) launch_these();
      append(p, plan, s, pass);
    }
    launch_these();
  }
  for (size_t s = 0; s < pairs.size(); ++s) {
    if (pairs[s] != kElementwise) continue;
    const int64_t each = 4 * kThreads;  // elements of a block, while the grid is not full
    strided(make_strided(plan, s, pass), std::min(device.most_blocks, (plan.segments[s].numel + each - 1) / each));
  }
}

}  // namespace gradproj::cuda

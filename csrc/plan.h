// From lists of buffers to what a kernel walks: pure host code, shared by CPU and CUDA, free of torch.
//
// A row is a list of n buffers (one per parameter); R rows are R x n buffers, row-major. Column i holds buffer i of
// every row. Columns belong to parts, each with a Gram of its own (one part unless told otherwise). A plan turns
// columns into segments, one per column that holds anything. A dense segment is a run of elements that every row holds
// gap-free and in the same order, so that one flat loop walks it whatever its shape. What has no such run (a transposed
// g against a contiguous d, a sliced view) is a strided segment with sizes and strides of its own, coalesced and
// ordered by the first row that is present.
// An absent buffer counts as zeros and is a null pointer.
//
// Nothing in a plan but the addresses depends on where buffers lie: sums that follow it have the same bits for any
// placement.
// So columns that touch in memory stay segments of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace gradproj {

enum class DType : uint8_t { f32, f64, f16, bf16 };

constexpr int64_t element_size(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// What the host knows of one tensor. data == nullptr with numel > 0 never happens; present == false is an absent row.
struct Buffer {
  const char* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;  // in elements
  int64_t numel = 0;
  int32_t ndim = 0;
  DType dtype = DType::f32;
  bool contiguous = false;
  bool present = false;
};

// A refusal. Nothing has been written when it is thrown; the Python side turns it into the precise error.
struct PlanError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct RowView {
  const char* data;  // null: absent, counts as zeros
  DType dtype;
};

struct Segment {
  int64_t numel;  // > 0
  int64_t dims;   // strided: where its sizes start in Plan::dims
  int32_t ndim;   // 0: dense
  int32_t part;   // ascending from segment to segment
};

struct Plan {
  int rows = 0;  // of every part's Gram: the gradient and the directions
  int parts = 1;
  std::vector<Segment> segments;
  std::vector<RowView> views;  // rows per segment, in the order of segments
  std::vector<int64_t> dims;   // per strided segment: ndim sizes, then ndim strides of every row (zeros for absent rows)
  bool any_f64 = false;        // then products and coefficients are float64

  const RowView* row_views(size_t segment) const { return &views[segment * static_cast<size_t>(rows)]; }
  const int64_t* sizes(const Segment& s) const { return &dims[static_cast<size_t>(s.dims)]; }
  const int64_t* strides(const Segment& s, int row) const { return sizes(s) + (1 + row) * s.ndim; }
};

namespace detail {

[[noreturn]] inline void refuse(const char* what, int row, int64_t column) {
  throw PlanError("gradproj: row " + std::to_string(row) + ", buffer " + std::to_string(column) + ": " + what);
}

// Can a column's elements repeat? Sizes and strides sorted by stride must nest: each stride clears what lies inside it.
inline bool nested(const Buffer& b) {
  if (b.contiguous || b.numel <= 1) return true;
  std::vector<int> order;
  for (int d = 0; d < b.ndim; ++d)
    if (b.sizes[d] > 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int x, int y) { return b.strides[x] < b.strides[y]; });
  int64_t extent = 1;
  for (int d : order) {
    if (b.strides[d] < extent) return false;
    extent = b.strides[d] * (b.sizes[d] - 1) + extent;
  }
  return true;
}

// The bytes from a buffer's first to past its last element.
inline int64_t extent_bytes(const Buffer& b) {
  if (b.contiguous) return b.numel * element_size(b.dtype);
  int64_t last = 0;
  for (int d = 0; d < b.ndim; ++d) last += (b.sizes[d] - 1) * b.strides[d];
  return (last + 1) * element_size(b.dtype);
}

// Coalesced sizes and strides of one column over its present rows, outermost first in the order of the leading row's
// strides. Returns true if one dimension of stride 1 in every present row (a dense run) is what remains.
inline bool coalesce(const Buffer* column, int rows, int64_t stride_between_rows, int leader, std::vector<int64_t>& sizes,
                     std::vector<std::vector<int64_t>>& strides) {
  const Buffer& first = column[leader * stride_between_rows];
  std::vector<int> order;
  for (int d = 0; d < first.ndim; ++d)
    if (first.sizes[d] > 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return first.strides[x] > first.strides[y]; });
  sizes.clear();
  strides.assign(static_cast<size_t>(rows), {});
  for (int d : order) {
    bool fold = !sizes.empty();
    for (int r = 0; r < rows && fold; ++r) {
      const Buffer& b = column[r * stride_between_rows];
      if (b.present) fold = strides[static_cast<size_t>(r)].back() == b.strides[d] * b.sizes[d];
    }
    if (fold)
      sizes.back() *= first.sizes[d];
    else
      sizes.push_back(first.sizes[d]);
    for (int r = 0; r < rows; ++r) {
      const Buffer& b = column[r * stride_between_rows];
      auto& s = strides[static_cast<size_t>(r)];
      int64_t value = b.present ? b.strides[d] : 0;
      if (fold)
        s.back() = value;
      else
        s.push_back(value);
    }
  }
  if (sizes.empty()) return true;  // one element
  if (sizes.size() > 1) return false;
  for (int r = 0; r < rows; ++r)
    if (column[r * stride_between_rows].present && strides[static_cast<size_t>(r)][0] != 1) return false;
  return true;
}

}  // namespace detail

// What is asked of a plan beyond the buffers. part: of each column, or empty for one part.
struct Layout {
  int rows;
  std::vector<int32_t> part = {};
  int parts = 1;
};

// Refuses rows whose shapes differ within a column. buffers: rows x n, row-major.
inline Plan make_plan(const std::vector<Buffer>& buffers, const Layout& layout) {
  const int rows = layout.rows;
  if (rows < 1 || buffers.size() % static_cast<size_t>(rows) != 0)
    throw PlanError("gradproj: rows of different length");
  const int64_t n = static_cast<int64_t>(buffers.size()) / rows;
  if (!layout.part.empty() && static_cast<int64_t>(layout.part.size()) != n)
    throw PlanError("gradproj: parts: one number per buffer");
  for (int32_t p : layout.part)
    if (p < 0 || p >= layout.parts) throw PlanError("gradproj: parts: a number is not below the number of parts");
  std::vector<int64_t> order;  // of the columns: by part
  if (!std::is_sorted(layout.part.begin(), layout.part.end())) {
    order.resize(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
      return layout.part[static_cast<size_t>(x)] < layout.part[static_cast<size_t>(y)];
    });
  }
  Plan plan;
  plan.rows = rows;
  plan.parts = layout.parts;
  plan.segments.reserve(static_cast<size_t>(n));
  plan.views.reserve(buffers.size());
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides;

  for (int64_t k = 0; k < n; ++k) {
    const int64_t i = order.empty() ? k : order[static_cast<size_t>(k)];
    const int32_t part = layout.part.empty() ? 0 : layout.part[static_cast<size_t>(i)];
    const Buffer* column = &buffers[static_cast<size_t>(i)];
    int leader = -1;
    bool flat = true;  // every present row contiguous: no need to look at strides
    for (int r = 0; r < rows; ++r) {
      const Buffer& b = column[r * n];
      if (!b.present) continue;
      if (leader < 0) leader = r;
      const Buffer& first = column[leader * n];
      if (b.ndim != first.ndim || !std::equal(b.sizes, b.sizes + b.ndim, first.sizes)) detail::refuse("shape differs", r, i);
      flat = flat && b.contiguous;
      plan.any_f64 = plan.any_f64 || b.dtype == DType::f64;
    }
    if (leader < 0 || column[leader * n].numel == 0) continue;
    const bool dense = flat || detail::coalesce(column, rows, n, leader, sizes, strides);

    plan.segments.push_back(
        {column[leader * n].numel, static_cast<int64_t>(plan.dims.size()), dense ? 0 : static_cast<int32_t>(sizes.size()), part});
    for (int r = 0; r < rows; ++r) {
      const Buffer& b = column[r * n];
      plan.views.push_back({b.present ? b.data : nullptr, b.dtype});
    }
    if (!dense) {
      plan.dims.insert(plan.dims.end(), sizes.begin(), sizes.end());
      for (const auto& s : strides) plan.dims.insert(plan.dims.end(), s.begin(), s.end());
    }
  }
  return plan;
}

}  // namespace gradproj

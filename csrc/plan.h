// From lists of buffers to what a kernel walks: pure host code, shared by CPU and CUDA, free of torch.
//
// A row is a list of n buffers (one per parameter); R rows are R x n buffers, row-major. Column i holds buffer i of
// every row. Columns belong to parts, each with a Gram of its own (one part unless told otherwise). A plan turns
// columns into segments, one per column that holds anything. A dense segment is a run of elements that every row holds
// gap-free and in the same order, so that one flat loop walks it whatever its shape. What has no such run (a transposed
// g against a contiguous d, a sliced view) is a strided segment with sizes and strides of its own, merged where
// possible and ordered by the first row that is present. An absent buffer counts as zeros and is a null pointer.
//
// Only the addresses in a plan depend on where buffers lie, so sums that follow it have the same bits for any
// placement. For that reason columns that touch in memory stay separate segments.
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

// What the host knows of one tensor. data is null only if numel is 0 or the buffer is absent.
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
  std::vector<int64_t> dims;   // per strided segment: ndim sizes, then ndim strides of every row (0: absent)
  bool any_f64 = false;        // then products and coefficients are float64

  const RowView* row_views(size_t segment) const { return &views[segment * rows]; }
  const int64_t* sizes(const Segment& s) const { return &dims[s.dims]; }
  const int64_t* strides(const Segment& s, int row) const { return sizes(s) + (1 + row) * s.ndim; }
};

// The shape of a call beyond its buffers.
struct Layout {
  int64_t rows;
  std::vector<int64_t> part = {};  // of each column; empty: there is one part
  int parts = 1;
};

namespace detail {

[[noreturn]] inline void refuse(const char* what, int row, int64_t column) {
  throw PlanError("gradproj: row " + std::to_string(row) + ", buffer " + std::to_string(column) + ": " + what);
}

// The dimensions of more than one element, the largest stride first.
inline std::vector<int> by_stride(const Buffer& b) {
  std::vector<int> order;
  for (int d = 0; d < b.ndim; ++d)
    if (b.sizes[d] > 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return b.strides[x] > b.strides[y]; });
  return order;
}

// One column, merged over its present rows: of every dimension that remains the size, then the stride of every row (0
// for absent rows); outermost first in the order of the strides of `first`, a present row.
inline std::vector<int64_t> merged_dims(const Buffer* column, int rows, size_t next_row, const Buffer& first) {
  std::vector<int64_t> dims, dim(1 + rows);
  for (int d : by_stride(first)) {
    const size_t outer = dims.size() - dim.size();
    bool fold = !dims.empty();
    dim[0] = first.sizes[d];
    for (int r = 0; r < rows; ++r) {
      const Buffer& b = column[r * next_row];
      dim[1 + r] = b.present ? b.strides[d] : 0;
      fold = fold && dims[outer + 1 + r] == dim[1 + r] * first.sizes[d];
    }
    if (fold) {
      dim[0] *= dims[outer];
      dims.resize(outer);
    }
    dims.insert(dims.end(), dim.begin(), dim.end());
  }
  return dims;
}

}  // namespace detail

// Refuses rows whose shapes differ within a column. buffers: rows x n, row-major.
inline Plan make_plan(const std::vector<Buffer>& buffers, const Layout& layout) {
  if (layout.rows < 1 || buffers.size() % layout.rows != 0) throw PlanError("gradproj: rows of different length");
  const int rows = static_cast<int>(layout.rows);
  const size_t n = buffers.size() / rows;
  if (!layout.part.empty() && layout.part.size() != n) throw PlanError("gradproj: parts: one number per buffer");
  for (int64_t p : layout.part)
    if (p < 0 || p >= layout.parts) throw PlanError("gradproj: parts: a number is not below num_parts");
  std::vector<size_t> order(n);  // of the columns: by part
  std::iota(order.begin(), order.end(), size_t{0});
  if (!layout.part.empty())
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return layout.part[x] < layout.part[y]; });
  Plan plan;
  plan.rows = rows;
  plan.parts = layout.parts;
  plan.segments.reserve(n);
  plan.views.reserve(buffers.size());

  for (size_t i : order) {
    const Buffer* column = &buffers[i];
    const Buffer* first = nullptr;  // of the rows that are present
    bool dense = true;
    for (int r = 0; r < rows; ++r) {
      const Buffer& b = column[r * n];
      if (!b.present) continue;
      if (!first) first = &b;
      if (b.ndim != first->ndim || !std::equal(b.sizes, b.sizes + b.ndim, first->sizes))
        detail::refuse("shape differs", r, i);
      dense = dense && b.contiguous;
      plan.any_f64 = plan.any_f64 || b.dtype == DType::f64;
    }
    if (!first || first->numel == 0) continue;
    const int32_t part = layout.part.empty() ? 0 : static_cast<int32_t>(layout.part[i]);
    Segment segment{first->numel, static_cast<int64_t>(plan.dims.size()), 0, part};
    for (int r = 0; r < rows; ++r) plan.views.push_back({column[r * n].data, column[r * n].dtype});
    if (!dense) {
      const std::vector<int64_t> dims = detail::merged_dims(column, rows, n, *first);
      const size_t width = 1 + rows;
      dense = dims.empty() || dims.size() == width;  // one element, or one dimension
      for (int r = 0; r < rows && !dims.empty(); ++r) dense = dense && (!column[r * n].present || dims[1 + r] == 1);
      if (!dense) segment.ndim = static_cast<int32_t>(dims.size() / width);
      for (size_t k = 0; k < width * segment.ndim; ++k)
        plan.dims.push_back(dims[k % segment.ndim * width + k / segment.ndim]);
    }
    plan.segments.push_back(segment);
  }
  return plan;
}

}  // namespace gradproj

// May row 0 be written? Refuses a gradient that overlaps itself, another gradient, or, in part, a direction. A
// direction that is exactly its gradient (same address, same strides) is fine: kernels load all rows of an element
// before they store. gradproj/kernels/validate.py answers the same questions with numpy, and words the error.
#pragma once

#include <functional>
#include <map>

#include "plan.h"

namespace gradproj {
namespace detail {

// Whether elements cannot repeat: each stride clears what lies inside it.
inline bool nested(const Buffer& b) {
  if (b.contiguous) return true;
  const std::vector<int> order = by_stride(b);
  int64_t extent = 1;
  for (size_t k = order.size(); k-- > 0;) {
    const int64_t stride = b.strides[order[k]];
    if (stride < extent) return false;
    extent += stride * (b.sizes[order[k]] - 1);
  }
  return true;
}

// The first byte past a buffer's last element.
inline const char* end_of(const Buffer& b) {
  int64_t last = b.numel - 1;
  if (!b.contiguous) {
    last = 0;
    for (int d = 0; d < b.ndim; ++d) last += (b.sizes[d] - 1) * b.strides[d];
  }
  return b.data + (last + 1) * element_size(b.dtype);
}

struct Term {
  int64_t stride, low, high;  // stride * c with low <= c <= high
};

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }

// Is there a choice of c with sum_i stride_i c_i == target? Strides positive, in descending order. budget bounds the
// search; when it runs out the answer is yes, the safe one.
inline bool reachable(const std::vector<Term>& terms, size_t k, int64_t target, int64_t& budget) {
  if (--budget < 0) return true;
  if (k == terms.size()) return target == 0;
  int64_t low = 0, high = 0;
  for (size_t i = k + 1; i < terms.size(); ++i) {
    low += terms[i].stride * terms[i].low;
    high += terms[i].stride * terms[i].high;
  }
  const Term& t = terms[k];
  const int64_t first = std::max(t.low, -floor_div(high - target, t.stride));
  const int64_t last = std::min(t.high, floor_div(target - low, t.stride));
  for (int64_t c = first; c <= last; ++c)
    if (reachable(terms, k + 1, target - t.stride * c, budget)) return true;
  return false;
}

// Do two buffers share a byte? Exact up to a bounded search.
inline bool share_memory(const Buffer& a, const Buffer& b) {
  std::map<int64_t, Term, std::greater<>> by_stride;
  auto add = [&](int64_t stride, int64_t low, int64_t high) {
    Term& t = by_stride.try_emplace(stride, Term{stride, 0, 0}).first->second;
    t.low += low;
    t.high += high;
  };
  for (int d = 0; d < a.ndim; ++d) add(a.strides[d] * element_size(a.dtype), 0, a.sizes[d] - 1);
  for (int d = 0; d < b.ndim; ++d) add(b.strides[d] * element_size(b.dtype), 1 - b.sizes[d], 0);
  add(1, 1 - element_size(b.dtype), element_size(a.dtype) - 1);  // the bytes of an element
  std::vector<Term> terms;
  for (const auto& [stride, term] : by_stride)
    if (stride > 0 && term.low < term.high) terms.push_back(term);
  int64_t budget = 100000;
  return reachable(terms, 0, reinterpret_cast<intptr_t>(b.data) - reinterpret_cast<intptr_t>(a.data), budget);
}

inline bool same_view(const Buffer& a, const Buffer& b) {
  return a.data == b.data && a.dtype == b.dtype &&
         ((a.contiguous && b.contiguous) || std::equal(a.strides, a.strides + a.ndim, b.strides));
}

}  // namespace detail

// buffers: rows x n, row-major; row 0 is written. Throws PlanError.
inline void check_writable(const std::vector<Buffer>& buffers, int rows) {
  struct Span {
    const char *begin, *end;
    size_t column;
  };
  const size_t n = buffers.size() / rows;
  std::vector<Span> spans;  // of the gradients, by address
  spans.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Buffer& g = buffers[i];
    if (g.numel == 0) continue;
    if (!detail::nested(g)) detail::refuse("overlaps itself and cannot be written", 0, i);
    spans.push_back({g.data, detail::end_of(g), i});
  }
  auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(spans.begin(), spans.end(), before)) std::sort(spans.begin(), spans.end(), before);
  std::vector<const char*> reach;  // the furthest end among spans 0..i: it tells a walk backwards when to stop
  for (const Span& s : spans) reach.push_back(reach.empty() ? s.end : std::max(reach.back(), s.end));

  auto check = [&](int row, size_t column, const char* end, size_t stop) {
    const Buffer& b = buffers[row * n + column];
    for (size_t k = stop; k-- > 0 && reach[k] > b.data;) {
      const Span& s = spans[k];
      const Buffer& g = buffers[s.column];
      if (s.end <= b.data || s.begin >= end || (row > 0 && s.column == column && detail::same_view(g, b))) continue;
      if (detail::share_memory(g, b)) detail::refuse("shares memory with a gradient that is written", row, column);
    }
  };
  for (size_t k = 1; k < spans.size(); ++k) check(0, spans[k].column, spans[k].end, k);
  for (int r = 1; r < rows; ++r)
    for (size_t i = 0; i < n; ++i) {
      const Buffer& b = buffers[r * n + i];
      if (b.numel == 0) continue;
      const Span past{detail::end_of(b), nullptr, i};
      check(r, i, past.begin, std::lower_bound(spans.begin(), spans.end(), past, before) - spans.begin());
    }
}

}  // namespace gradproj

// May row 0 be written? Refuses a gradient that overlaps itself, another gradient, or, in part, a direction. A
// direction that is exactly its gradient (same address, same strides) is fine: kernels load all rows of an element
// before they store.
// Pure host code. gradproj/kernels/validate.py answers the same questions with numpy, and words the error.
#pragma once

#include "plan.h"

namespace gradproj {
namespace detail {

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
  std::vector<Term> terms;
  auto add = [&](const Buffer& x, int64_t sign) {
    const int64_t size = element_size(x.dtype);
    for (int d = 0; d <= x.ndim; ++d) {  // the last one walks the bytes of an element
      const int64_t stride = d < x.ndim ? x.strides[d] * size : 1;
      const int64_t span = (d < x.ndim ? x.sizes[d] : size) - 1;
      if (stride > 0 && span > 0) terms.push_back({stride, sign < 0 ? -span : 0, sign < 0 ? 0 : span});
    }
  };
  add(a, 1);
  add(b, -1);
  std::sort(terms.begin(), terms.end(), [](const Term& x, const Term& y) { return x.stride > y.stride; });
  std::vector<Term> merged;
  for (const Term& t : terms) {
    if (!merged.empty() && merged.back().stride == t.stride) {
      merged.back().low += t.low;
      merged.back().high += t.high;
    } else {
      merged.push_back(t);
    }
  }
  int64_t budget = 100000;
  return reachable(merged, 0, static_cast<int64_t>(reinterpret_cast<intptr_t>(b.data) - reinterpret_cast<intptr_t>(a.data)),
                   budget);
}

inline bool same_view(const Buffer& a, const Buffer& b) {
  return a.data == b.data && a.dtype == b.dtype &&
         ((a.contiguous && b.contiguous) || std::equal(a.strides, a.strides + a.ndim, b.strides));
}

}  // namespace detail

// buffers: rows x n, row-major; row 0 is written. Throws PlanError.
inline void check_writable(const std::vector<Buffer>& buffers, int rows) {
  struct Span {
    const char* begin;
    const char* end;
    int64_t column;
  };
  const int64_t n = static_cast<int64_t>(buffers.size()) / rows;
  std::vector<Span> spans;
  spans.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const Buffer& g = buffers[static_cast<size_t>(i)];
    if (!g.present || g.numel == 0) continue;
    if (!detail::nested(g)) detail::refuse("overlaps itself and cannot be written", 0, i);
    spans.push_back({g.data, g.data + detail::extent_bytes(g), i});
  }
  auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(spans.begin(), spans.end(), before)) std::sort(spans.begin(), spans.end(), before);
  // reach[i]: the furthest end among spans 0..i, so that a backwards walk knows when to stop.
  std::vector<const char*> reach(spans.size());
  for (size_t i = 0; i < spans.size(); ++i) reach[i] = i ? std::max(reach[i - 1], spans[i].end) : spans[i].end;

  auto refuse_if_shared = [&](const Buffer& b, int row, int64_t column, const char* end, size_t stop) {
    for (size_t k = stop; k-- > 0 && reach[k] > b.data;) {
      const Span& s = spans[k];
      if (s.end <= b.data || s.begin >= end) continue;
      const Buffer& g = buffers[static_cast<size_t>(s.column)];
      if (row > 0 && s.column == column && detail::same_view(g, b)) continue;
      if (detail::share_memory(g, b)) detail::refuse("shares memory with a gradient that is written", row, column);
    }
  };
  for (size_t i = 1; i < spans.size(); ++i)
    if (reach[i - 1] > spans[i].begin)
      refuse_if_shared(buffers[static_cast<size_t>(spans[i].column)], 0, spans[i].column, spans[i].end, i);
  for (int r = 1; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) {
      const Buffer& b = buffers[static_cast<size_t>(r * n + i)];
      if (!b.present || b.numel == 0) continue;
      const char* end = b.data + detail::extent_bytes(b);
      const auto stop = std::lower_bound(spans.begin(), spans.end(), end, [](const Span& s, const char* e) { return s.begin < e; });
      refuse_if_shared(b, r, i, end, static_cast<size_t>(stop - spans.begin()));
    }
}

}  // namespace gradproj

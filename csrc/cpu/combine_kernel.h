// Weighted sums of rows. Included by kernels_impl.h.

// Weights and pointers are copied to locals: in memory they could alias out, and would be read again after every store.
template <typename T, typename G, typename S, int kRows>
void combine_rows(G* out, const void* const* rows, const double* weights, int64_t n) {
  using First = Step<T, G, !std::is_same_v<G, S>>;
  using Other = Step<T, S, !std::is_same_v<G, S>>;
  using V = typename First::V;
  const G* g = static_cast<const G*>(rows[0]);
  const S* x[kRows];
  T w[kRows];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const S*>(rows[r]);  // x[0] is g where G is S, and is not used
    w[r] = static_cast<T>(weights[r]);
  }
  constexpr int kSteps = 2;
  int64_t i = 0;
  for (; i + kSteps * First::kElements <= n; i += kSteps * First::kElements) {
    V total[kSteps][First::kVectors];
    GRADPROJ_UNROLL for (int u = 0; u < kSteps; ++u) {
      const int64_t at = i + u * First::kElements;
      if (kRows >= 4) prefetch(g + at);
      GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) total[u][v] = w[0] * First::load(g + at, v);
      GRADPROJ_UNROLL for (int r = 1; r < kRows; ++r) {
        if (kRows >= 4) prefetch(x[r] + at);
        GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) total[u][v] += w[r] * Other::load(x[r] + at, v);
      }
    }
    GRADPROJ_UNROLL for (int u = 0; u < kSteps; ++u) First::store(out + i + u * First::kElements, total[u]);
  }
  for (; i < n; ++i) {
    T total = w[0] * decode(g[i]);
    for (int r = 1; r < kRows; ++r) total += w[r] * decode(x[r][i]);
    encode(total, out[i]);
  }
}

// Rows that walk in step.
constexpr int kMost = 9;

// Any number of rows: the sum of a tile stays on the stack, because a later row may be the very memory of out.
template <typename T, typename G, typename S>
void combine_tiles(G* out, const void* const* rows, const double* weights, int num_rows, int64_t n) {
  alignas(64) T sum[kTile];
  const void* x[kMost] = {sum};
  double w[kMost] = {1.0};
  for (int64_t start = 0; start < n; start += kTile) {
    const int64_t count = n - start < kTile ? n - start : kTile;
    const G* g = static_cast<const G*>(rows[0]) + start;
    for (int64_t i = 0; i < count; ++i) sum[i] = static_cast<T>(weights[0]) * decode(g[i]);
    for (int r = 1; r < num_rows; r += kMost - 1) {
      const int more = num_rows - r < kMost ? num_rows - r : kMost - 1;
      for (int k = 0; k < more; ++k) {
        x[1 + k] = static_cast<const S*>(rows[r + k]) + start;
        w[1 + k] = weights[r + k];
      }
      with_count<kMost>(1 + more, [&](auto k) { combine_rows<T, T, S, decltype(k)::value>(sum, x, w, count); });
    }
    for (int64_t i = 0; i < count; ++i) encode(sum[i], out[start + i]);
  }
}

template <typename T, typename G, typename S>
void combine(void* to, const void* const* rows, const double* weights, int num_rows, int64_t n) {
  G* out = static_cast<G*>(to);
  if (num_rows > kMost) return combine_tiles<T, G, S>(out, rows, weights, num_rows, n);
  if (num_rows > 0)
    return with_count<kMost>(num_rows,
                             [&](auto k) { combine_rows<T, G, S, decltype(k)::value>(out, rows, weights, n); });
  for (int64_t i = 0; i < n; ++i) encode(T(0), out[i]);
}

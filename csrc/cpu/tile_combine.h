// Weighted sums of rows. Part of tile_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

// Weights and pointers in locals: what lies in memory could be what out points to, and would be read again after every store.
template <typename T, typename S, int kRows>
void combine_rows(S* out, const S* const* rows, const T* weights, int64_t n) {
  using L = Lane<T, S>;
  using V = typename L::V;
  const S* x[kRows];
  T w[kRows];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
    x[r] = rows[r];
    w[r] = weights[r];
  }
  int64_t i = 0;
  for (; i + 2 * L::kElements <= n; i += 2 * L::kElements) {
    V total[2][L::kVectors];
    GRADPROJ_UNROLL for (int u = 0; u < 2; ++u)
      GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
        V value[L::kVectors];
        L::load(x[r] + i + u * L::kElements, value);
        if (kRows >= 4) prefetch(x[r] + i + u * L::kElements + kTile);
        GRADPROJ_UNROLL for (int v = 0; v < L::kVectors; ++v)
          total[u][v] = r ? total[u][v] + w[r] * value[v] : w[r] * value[v];
      }
    GRADPROJ_UNROLL for (int u = 0; u < 2; ++u) L::store(out + i + u * L::kElements, total[u]);
  }
  for (; i < n; ++i) {
    T total = w[0] * L::get(x[0][i]);
    for (int r = 1; r < kRows; ++r) total += w[r] * L::get(x[r][i]);
    out[i] = L::put(total);
  }
}

template <typename T, typename S>
void combine(S* out, const S* const* rows, const T* weights, int num_rows, int64_t n) {
  if (num_rows > 0 && num_rows <= 9)
    return with_count<9>(num_rows, [&](auto c) { combine_rows<T, S, decltype(c)::value>(out, rows, weights, n); });
  // More rows: the sum in T on the stack, because a later row may be the very memory of out.
  alignas(64) T partial[kTile];
  for (int64_t start = 0; start < n; start += kTile) {
    const int64_t count = n - start < kTile ? n - start : kTile;
    for (int64_t i = 0; i < count; ++i) partial[i] = T(0);
    for (int r = 0; r < num_rows; ++r)
      for (int64_t i = 0; i < count; ++i) partial[i] += weights[r] * Lane<T, S>::get(rows[r][start + i]);
    for (int64_t i = 0; i < count; ++i) out[start + i] = Lane<T, S>::put(partial[i]);
  }
}

// out = weight g + kRows directions that walk in step.
template <typename S, int kRows>
inline void mixed_combine_of(float* out, const float* g, float weight, const S* const* rows, const float* weights, int64_t n) {
  using V = Vector<float>::type;
  using D = Decode<S>;
  constexpr int kWidth = Vector<float>::kWidth;
  const S* x[kRows];
  float w[kRows];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
    x[r] = rows[r];
    w[r] = weights[r];
  }
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    prefetch_rows<kRows>(x, i);
    V total = weight * Decode<float>::load(g + i);
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) total += w[r] * D::load(x[r] + i);
    *reinterpret_cast<Vector<float>::unaligned*>(out + i) = total;
  }
  for (; i < n; ++i) {
    float total = weight * g[i];
    for (int r = 0; r < kRows; ++r) total += w[r] * D::get(x[r][i]);
    out[i] = total;
  }
}

template <typename S>
void mixed_combine(float* out, const float* g, float weight, const void* const* rows, const float* weights, int num_rows,
                   int64_t start, int64_t n) {
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t count = n - at < kTile ? n - at : kTile;
    const float* source = g + at;
    float first = weight;
    for (int r = 0; r < num_rows; r += kGroup) {
      const S* x[kGroup];
      const int group = num_rows - r < kGroup ? num_rows - r : kGroup;
      for (int k = 0; k < group; ++k) x[k] = static_cast<const S*>(rows[r + k]) + start + at;
      with_count<kGroup>(group, [&](auto c) {
        mixed_combine_of<S, decltype(c)::value>(out + at, source, first, x, weights + r, count);
      });
      source = out + at;
      first = 1.0f;
    }
  }
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

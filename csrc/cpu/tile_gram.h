// Inner products. Part of tile_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

// Additions of float32 to one lane before it is widened. Of equal elements every one may round the same way: then 48 of them
// cost 8e-7 of the sum.
constexpr int kChain = 48;

// Products of kX rows with kY others over elements begin to end, pair (a, b) added to acc + at(a, b) * kLanes; with kTriangle
// the others are the rows themselves and only a <= b counts. Rows are taken in blocks so that each load serves several products.
template <typename T, typename S, int kX, int kY, bool kTriangle, typename At>
inline void products(const S* const* x, const S* const* y, int64_t begin, int64_t end, double* acc, const At& at) {
  using L = Lane<T, S>;
  using V = typename L::V;
  constexpr int kPairs = kTriangle ? kX * (kX + 1) / 2 : kX * kY, kUnroll = kPairs <= 3 ? 4 : kPairs <= 6 ? 2 : 1;
  constexpr int64_t kStep = kUnroll * L::kElements, kRun = kChain / L::kVectors * kStep;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = end - i < kRun ? end : i + kRun;
    V sums[kUnroll][kX][kY];
    GRADPROJ_UNROLL for (int u = 0; u < kUnroll; ++u)
      GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
        GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) sums[u][a][b] = V{};
    for (; i + kStep <= stop; i += kStep)
      GRADPROJ_UNROLL for (int u = 0; u < kUnroll; ++u) {
        V vx[kX][L::kVectors], vy[kY][L::kVectors];
        GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) {
          L::load(x[a] + i + u * L::kElements, vx[a]);
          if (kTriangle && kX == 3) prefetch(x[a] + i + u * L::kElements + kTile);
        }
        if (!kTriangle)
          GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) L::load(y[b] + i + u * L::kElements, vy[b]);
        GRADPROJ_UNROLL for (int v = 0; v < L::kVectors; ++v)
          GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
            GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b)
              sums[u][a][b] += vx[a][v] * (kTriangle ? vx[b][v] : vy[b][v]);
      }
    GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
      GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) {
        V total = sums[0][a][b];
        GRADPROJ_UNROLL for (int u = 1; u < kUnroll; ++u) total += sums[u][a][b];
        double* pair = acc + at(a, b) * kLanes;
        flush<T>(total, pair);
        for (int64_t k = i; k < stop; ++k)
          pair[0] += static_cast<double>(L::get(x[a][k]) * L::get((kTriangle ? x : y)[b][k]));
      }
    i = stop;
  }
}

template <typename T, typename S, int kX, typename At>
inline void block_row(const S* const* x, const S* const* y, int count, int64_t begin, int64_t end, double* acc, const At& at) {
  switch (count) {
    case 1: return products<T, S, kX, 1, false>(x, y, begin, end, acc, at);
    case 2: return products<T, S, kX, 2, false>(x, y, begin, end, acc, at);
    default: return products<T, S, kX, 3, false>(x, y, begin, end, acc, at);
  }
}

// Rows in blocks of three. K = 1, the case that has to run at the speed of memory, is one block of two rows.
template <typename T, typename S>
inline void gram_blocks(const S* const* rows, int num_rows, int64_t begin, int64_t end, bool row_only, double* acc) {
  if (row_only) {
    for (int j = 0; j < num_rows; j += 3) {
      const int count = num_rows - j < 3 ? num_rows - j : 3;
      block_row<T, S, 1>(rows, rows + j, count, begin, end, acc, [j](int, int b) { return j + b; });
    }
    return;
  }
  auto pair = [num_rows](int i, int j) { return i * num_rows - i * (i - 1) / 2 + j - i; };
  for (int i = 0; i < num_rows; i += 3) {
    const S* const* x = rows + i;
    const int height = num_rows - i < 3 ? num_rows - i : 3;
    auto diagonal = [=](int a, int b) { return pair(i + a, i + b); };
    if (height == 1) products<T, S, 1, 1, true>(x, x, begin, end, acc, diagonal);
    if (height == 2) products<T, S, 2, 2, true>(x, x, begin, end, acc, diagonal);
    if (height == 3) products<T, S, 3, 3, true>(x, x, begin, end, acc, diagonal);
    for (int j = i + 3; j < num_rows; j += 3) {
      const int count = num_rows - j < 3 ? num_rows - j : 3;
      block_row<T, S, 3>(x, rows + j, count, begin, end, acc, [=](int a, int b) { return pair(i + a, j + b); });
    }
  }
}

// Several blocks read rows again, so they take a tile at a time, from L1. One block reads each row once and never pauses.
template <typename T, typename S>
void gram(const S* const* rows, int num_rows, int64_t n, bool row_only, double* acc) {
  const int64_t step = num_rows <= 3 ? n : kTile;
  for (int64_t i = 0; i < n; i += step) gram_blocks<T, S>(rows, num_rows, i, n - i < step ? n : i + step, row_only, acc);
}

// Products of the gradient with kRows directions that walk in step, and with itself if kOwn.
template <typename S, int kRows, bool kOwn>
inline void mixed_products_of(const float* g, const S* const* rows, int64_t n, double* own_acc, double* acc) {
  using V = Vector<float>::type;
  using D = Decode<S>;
  constexpr int kWidth = Vector<float>::kWidth;
  const S* x[kRows];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) x[r] = rows[r];
  int64_t i = 0;
  while (i + kWidth <= n) {
    const int64_t stop = n - i < kChain * kWidth ? n : i + kChain * kWidth;
    V own = {}, sums[kRows];
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) sums[r] = V{};
    for (; i + kWidth <= stop; i += kWidth) {
      prefetch_rows<kRows>(x, i);
      const V y = Decode<float>::load(g + i);
      if (kOwn) own += y * y;
      GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) sums[r] += D::load(x[r] + i) * y;
    }
    if (kOwn) flush<float>(own, own_acc);
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) flush<float>(sums[r], acc + r * kLanes);
  }
  for (; i < n; ++i) {
    if (kOwn) own_acc[0] += static_cast<double>(g[i] * g[i]);
    for (int r = 0; r < kRows; ++r) acc[r * kLanes] += static_cast<double>(D::get(x[r][i]) * g[i]);
  }
}

template <typename S>
void mixed_products(const float* g, const void* const* rows, int num_rows, int64_t start, int64_t n, double* acc) {
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t count = n - at < kTile ? n - at : kTile;
    for (int r = 0; r < num_rows; r += kGroup) {
      const S* x[kGroup];
      const int group = num_rows - r < kGroup ? num_rows - r : kGroup;
      for (int k = 0; k < group; ++k) x[k] = static_cast<const S*>(rows[r + k]) + start + at;
      with_count<kGroup>(group, [&](auto c) {
        if (r == 0)
          mixed_products_of<S, decltype(c)::value, true>(g + at, x, count, acc, acc + (1 + r) * kLanes);
        else
          mixed_products_of<S, decltype(c)::value, false>(g + at, x, count, acc, acc + (1 + r) * kLanes);
      });
    }
  }
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

// Inner products. Part of kernels_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

// Order of summation of one pair over n elements, the same in every kernel here and for any number of rows, so that the product
// of two rows depends on nothing but them: lane by lane over the vectors of a section, from zero; the sections of a tile
// ascending, of 16-bit rows the even elements of each before the odd ones; tiles ascending, in double; then what fills no
// vector. A section starts from zero so that its additions do not wait for the last one's: several are computed at a time.
//
// Of equal elements every float32 addition may round the same way. 40 of them, 8 in a section and 32 sections, cost 7e-7.
constexpr int kSteps = 8;
template <typename Row>
constexpr int64_t kSection = kSteps * Row::kElements;

// Rows of a block. Its sums and rows have to fit the registers: 16 of them, or AVX-512's 32.
constexpr int kBlock = GRADPROJ_VECTOR_BYTES == 64 ? 5 : 3;

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// Calls step(i) for the steps of a section from element `at` on, as many as there are in front of `end`.
template <typename Row, typename F>
inline __attribute__((always_inline)) void for_steps(int64_t at, int64_t end, const F& step) {
  if (end - at >= kSection<Row>)
    for (int64_t i = at; i < at + kSection<Row>; i += 2 * Row::kElements) step(i), step(i + Row::kElements);
  else
    for (; at < end; at += Row::kElements) step(at);
}

// How many of the vectors of a step are summed side by side: all, if the registers hold their sums.
template <typename Row>
constexpr int side_by_side(int sums) {
  return sums * Row::kVectors <= (GRADPROJ_VECTOR_BYTES == 64 ? 20 : 10) ? Row::kVectors : 1;
}

// Adds the products of kX rows x with kY rows y over elements [begin, end), part of a tile, to a vector per pair; if kTriangle,
// y is x and only pairs a <= b count. Each load serves several products.
template <typename T, typename S, int kX, int kY, bool kTriangle>
inline void block(const S* const* x_rows, const S* const* y_rows, int64_t begin, int64_t end,
                  typename Vector<T>::type* vectors) {
  using Row = Step<T, S, false>;
  using V = typename Row::V;
  constexpr int kSide = side_by_side<Row>(kTriangle ? kX * (kX + 1) / 2 : kX * kY);
  const S *x[kX], *y[kY];
  GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) x[a] = x_rows[a];
  GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) y[b] = y_rows[b];
  for (int64_t at = begin; at < end; at += kSection<Row>)
    GRADPROJ_UNROLL for (int first = 0; first < Row::kVectors; first += kSide) {
      V set[kSide][kX][kY];
      GRADPROJ_UNROLL for (int v = 0; v < kSide; ++v)
        GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
          GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) set[v][a][b] = V{};
      for_steps<Row>(at, end, [&](int64_t i) __attribute__((always_inline)) {
        GRADPROJ_UNROLL for (int v = 0; v < kSide; ++v) {
          V vx[kX], vy[kY];
          GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) vx[a] = Row::load(x[a] + i, first + v);
          if (!kTriangle) GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) vy[b] = Row::load(y[b] + i, first + v);
          GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
            GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) set[v][a][b] += vx[a] * (kTriangle ? vx[b] : vy[b]);
        }
      });
      GRADPROJ_UNROLL for (int v = 0; v < kSide; ++v)
        GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a)
          GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) vectors[p++] += set[v][a][b];
    }
}

// Up to kBlock rows: each is read once.
template <typename T, typename S, int kRows>
void gram_one_block(const S* const* rows, int64_t n, PairSum* sums) {
  using V = typename Vector<T>::type;
  constexpr int kPairs = kRows * (kRows + 1) / 2;
  for (int64_t tile = 0; tile < n; tile += kTile) {
    V vectors[kPairs];
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) vectors[p] = V{};
    block<T, S, kRows, kRows, true>(rows, rows, tile, tile + at_most(n - tile, kTile), vectors);
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) widen<T>(vectors[p], sums[p]);
  }
}

// All pairs of any number of rows over elements [begin, end), block by block, to vectors in that order.
template <typename T, typename S>
inline void add_blocks(const S* const* rows, int num_rows, int64_t begin, int64_t end, typename Vector<T>::type* vectors) {
  for (int i = 0; i < num_rows; i += kBlock) {
    with_count<kBlock>(at_most(num_rows - i, kBlock), [&](auto count) {
      constexpr int kX = decltype(count)::value;
      block<T, S, kX, kX, true>(rows + i, rows + i, begin, end, vectors);
      vectors += kX * (kX + 1) / 2;
    });
    for (int j = i + kBlock; j < num_rows; j += kBlock)
      with_count<kBlock>(at_most(num_rows - j, kBlock), [&](auto count) {
        constexpr int kY = decltype(count)::value;
        block<T, S, kBlock, kY, false>(rows + i, rows + j, begin, end, vectors);
        vectors += kBlock * kY;
      });
  }
}

// All blocks go through a section before they go on: the processor's prefetchers then see all rows advance side by side, and
// run ahead of them while the blocks compute.
template <typename T, typename S>
void gram_blocks(const S* const* rows, int num_rows, int64_t n, PairSum* sums) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLength = kSection<Step<T, S, false>>;
  const int pairs = num_rows * (num_rows + 1) / 2;
  V* vectors = reinterpret_cast<V*>(sums + pairs);
  for (int64_t tile = 0; tile < n; tile += kTile) {
    const int64_t end = tile + at_most(n - tile, kTile);
    for (int p = 0; p < pairs; ++p) vectors[p] = V{};
    for (int64_t at = tile; at < end; at += kLength)
      add_blocks<T, S>(rows, num_rows, at, at + at_most(end - at, kLength), vectors);
    for (int p = 0; p < pairs; ++p) widen<T>(vectors[p], sums[p]);
  }
}

template <typename T, typename S>
void gram_full(const S* const* rows, int num_rows, int64_t n, PairSum* sums) {
  const int64_t whole = n - n % Step<T, S, false>::kElements;
  if (num_rows <= kBlock)
    with_count<kBlock>(num_rows, [&](auto count) { gram_one_block<T, S, decltype(count)::value>(rows, whole, sums); });
  else
    gram_blocks<T, S>(rows, num_rows, whole, sums);
  for (int64_t at = whole; at < n; ++at)
    for (int i = 0; i < num_rows; ++i)
      for (int j = i; j < num_rows; ++j)
        sums[pair_place(kBlock, num_rows, i, j)].lanes[0] += static_cast<double>(decode(rows[i][at]) * decode(rows[j][at]));
}

// Directions that walk in step with the gradient: what 16 registers hold.
constexpr int kRowsAtOnce = 8;

// <g, g> if kOwn, and <g, rows[r]>, over elements [begin, end), a tile or less.
template <typename T, typename G, typename S, int kRows, bool kOwn>
inline void row_products(const G* g, const void* const* rows, int64_t begin, int64_t end, PairSum& own_sum, PairSum* sums) {
  using First = Step<T, G, !std::is_same_v<G, S>>;
  using Other = Step<T, S, !std::is_same_v<G, S>>;
  using V = typename First::V;
  const S* x[kRows];
  V own{}, products[kRows];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
    x[r] = static_cast<const S*>(rows[r]);
    products[r] = V{};
  }
  constexpr int kSide = side_by_side<First>(kRows + kOwn);
  for (int64_t at = begin; at < end; at += kSection<First>)
    GRADPROJ_UNROLL for (int first = 0; first < First::kVectors; first += kSide) {
      V own_set[kSide], set[kSide][kRows];
      GRADPROJ_UNROLL for (int v = 0; v < kSide; ++v) {
        own_set[v] = V{};
        GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) set[v][r] = V{};
      }
      for_steps<First>(at, end, [&](int64_t i) __attribute__((always_inline)) {
        if (kRows >= 3 && first == 0) GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) prefetch(x[r] + i);
        GRADPROJ_UNROLL for (int v = 0; v < kSide; ++v) {
          const V y = First::load(g + i, first + v);
          if (kOwn) own_set[v] += y * y;
          GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) set[v][r] += y * Other::load(x[r] + i, first + v);
        }
      });
      GRADPROJ_UNROLL for (int v = 0; v < kSide; ++v) {
        if (kOwn) own += own_set[v];
        GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) products[r] += set[v][r];
      }
    }
  if (kOwn) widen<T>(own, own_sum);
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) widen<T>(products[r], sums[r]);
}

// The pairs of row 0 with rows 0 .. num_rows - 1.
template <typename T, typename G, typename S>
void gram_row(const void* const* rows, int num_rows, int64_t n, PairSum* sums) {
  const G* g = static_cast<const G*>(rows[0]);
  const int64_t whole = n - n % Step<T, G, !std::is_same_v<G, S>>::kElements;
  for (int64_t at = 0; at < whole; at += kTile) {
    const int64_t end = at + at_most(whole - at, kTile);
    for (int r = 1; r < num_rows; r += kRowsAtOnce)
      with_count<kRowsAtOnce>(num_rows - r < kRowsAtOnce ? num_rows - r : kRowsAtOnce, [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        if (r == 1)
          row_products<T, G, S, kRows, true>(g, rows + r, at, end, sums[0], sums + r);
        else
          row_products<T, G, S, kRows, false>(g, rows + r, at, end, sums[0], sums + r);
      });
  }
  for (int64_t at = whole; at < n; ++at) {
    const T y = decode(g[at]);
    sums[0].lanes[0] += static_cast<double>(y * y);
    for (int r = 1; r < num_rows; ++r) sums[r].lanes[0] += static_cast<double>(y * decode(static_cast<const S*>(rows[r])[at]));
  }
}

template <typename T, typename G, typename S>
void gram(const void* const* rows, int num_rows, int64_t n, bool row_only, PairSum* sums) {
  if (row_only && num_rows > 1) return gram_row<T, G, S>(rows, num_rows, n, sums);
  if constexpr (std::is_same_v<G, S>) gram_full<T, S>(reinterpret_cast<const S* const*>(rows), num_rows, n, sums);
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

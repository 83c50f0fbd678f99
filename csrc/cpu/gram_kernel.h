// Inner products. Part of kernels_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

// Order of summation of one pair over n elements, the same in every kernel here and for any number of rows, so that the
// product of two rows depends on nothing but them: lane by lane over the vectors of a run, from zero; runs ascending,
// in double; then what fills no vector. Of 16-bit rows a step's even elements come before its odd ones.
//
// Of equal elements every float32 addition may round the same way: then the 48 of a run cost 8e-7 of the sum.
constexpr int kChain = 48;
template <typename Row>
constexpr int64_t kRun = kChain / Row::kVectors * Row::kElements;

// Rows of a block. Its sums and rows have to fit the registers: 16 of them, or AVX-512's 32.
constexpr int kBlock = GRADPROJ_VECTOR_BYTES == 64 ? 5 : 3;

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// Bytes of each row that all blocks go through before they go on. So little, because the processor's prefetchers then
// see all rows advance side by side, and run ahead of them while the blocks compute.
constexpr int64_t kBlockTile = 512;

// Adds the products of kX rows x with kY rows y over elements [begin, end), part of a run, to a vector per pair; if
// kTriangle, y is x and only pairs a <= b count. Each load serves several products.
template <typename T, typename S, int kX, int kY, bool kTriangle>
inline void block(const S* const* x_rows, const S* const* y_rows, int64_t begin, int64_t end,
                  typename Vector<T>::type* vectors) {
  using Row = Step<T, S, false>;
  using V = typename Row::V;
  const S *x[kX], *y[kY];
  V sums[kX][kY];
  GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) y[b] = y_rows[b];
  GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a) {
    x[a] = x_rows[a];
    GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) sums[a][b] = vectors[p++];
  }
  const auto step = [&](int64_t at) __attribute__((always_inline)) {
    GRADPROJ_UNROLL for (int v = 0; v < Row::kVectors; ++v) {
      V vx[kX], vy[kY];
      GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) vx[a] = Row::load(x[a] + at, v);
      if (!kTriangle) GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) vy[b] = Row::load(y[b] + at, v);
      GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
        GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) sums[a][b] += vx[a] * (kTriangle ? vx[b] : vy[b]);
    }
  };
  int64_t at = begin;
  for (; at + 2 * Row::kElements <= end; at += 2 * Row::kElements) step(at), step(at + Row::kElements);
  for (; at < end; at += Row::kElements) step(at);
  GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a)
    GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) vectors[p++] = sums[a][b];
}

// Up to kBlock rows: each is read once, and the sums of a run stay in registers.
template <typename T, typename S, int kRows>
void gram_one_block(const S* const* rows, int64_t n, PairSum* sums) {
  using V = typename Vector<T>::type;
  constexpr int kPairs = kRows * (kRows + 1) / 2;
  constexpr int64_t kLength = kRun<Step<T, S, false>>;
  for (int64_t at = 0; at < n; at += kLength) {
    V vectors[kPairs];
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) vectors[p] = V{};
    block<T, S, kRows, kRows, true>(rows, rows, at, at + at_most(n - at, kLength), vectors);
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

template <typename T, typename S>
void gram_blocks(const S* const* rows, int num_rows, int64_t n, PairSum* sums) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLength = kRun<Step<T, S, false>>, kBlockElements = kBlockTile / static_cast<int64_t>(sizeof(S));
  const int pairs = num_rows * (num_rows + 1) / 2;
  V* vectors = reinterpret_cast<V*>(sums + pairs);
  for (int64_t at = 0; at < n;) {
    const int64_t end = at + at_most(n - at, kLength);
    for (int p = 0; p < pairs; ++p) vectors[p] = V{};
    for (; at < end; at += kBlockElements) add_blocks<T, S>(rows, num_rows, at, at + at_most(end - at, kBlockElements), vectors);
    at = end;
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

// <g, g> if kOwn, and <g, rows[r]>, over elements [begin, end), whole steps.
template <typename T, typename G, typename S, int kRows, bool kOwn>
inline void row_products(const G* g, const void* const* rows, int64_t begin, int64_t end, PairSum& own_sum, PairSum* sums) {
  using First = Step<T, G, !std::is_same_v<G, S>>;
  using Other = Step<T, S, !std::is_same_v<G, S>>;
  using V = typename First::V;
  static_assert(kTile % kRun<First> == 0, "runs of a row that goes through tiles are those of one that does not");
  const S* x[kRows];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) x[r] = static_cast<const S*>(rows[r]);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = at + at_most(end - at, kRun<First>);
    V own{}, products[kRows];
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) products[r] = V{};
    const auto step = [&](int64_t i) __attribute__((always_inline)) {
      V y[First::kVectors];
      GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) {
        y[v] = First::load(g + i, v);
        if (kOwn) own += y[v] * y[v];
      }
      GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
        if (kRows >= 3) prefetch(x[r] + i);
        GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) products[r] += y[v] * Other::load(x[r] + i, v);
      }
    };
    for (; at + 2 * First::kElements <= stop; at += 2 * First::kElements) step(at), step(at + First::kElements);
    for (; at < stop; at += First::kElements) step(at);
    if (kOwn) widen<T>(own, own_sum);
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) widen<T>(products[r], sums[r]);
  }
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

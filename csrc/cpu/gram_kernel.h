// Inner products. Part of kernels_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

// Additions of float32 to one lane before it is widened. Of equal elements every one may round the same way: then 48 of them
// cost 8e-7 of the sum.
constexpr int kChain = 48;

// Rows of a block. Its sums and rows have to fit the registers: 16 of them, or AVX-512's 32.
constexpr int kBlock = GRADPROJ_VECTOR_BYTES == 64 ? 5 : 3;

// Bytes of each row that all blocks go through before they go on. So little, because the processor's prefetchers then see all
// rows advance side by side, and run ahead of them while the blocks compute.
constexpr int64_t kBlockTile = 512;

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// Adds the products of kX rows x with kY rows y over n elements from begin, a multiple of a step, to a vector per pair; if
// kTriangle, y is x and only pairs a <= b count. Each load serves several products.
template <typename T, typename S, int kX, int kY, bool kTriangle>
inline void block(const S* const* x_rows, const S* const* y_rows, int64_t begin, int64_t n, typename Vector<T>::type* vectors) {
  using Row = Step<T, S, false>;
  using V = typename Row::V;
  constexpr int kPairs = kTriangle ? kX * (kX + 1) / 2 : kX * kY;
  constexpr int kSets = kPairs <= 3 ? 4 : kPairs <= 6 ? 2 : 1;  // of sums, so that additions need not wait for each other
  constexpr int kSteps = kSets == 1 ? 2 : kSets;
  const S *x[kX], *y[kY];
  V set[kSets][kX][kY];
  GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) y[b] = y_rows[b] + begin;
  GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a) {
    x[a] = x_rows[a] + begin;
    GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) {
      set[0][a][b] = vectors[p++];
      GRADPROJ_UNROLL for (int u = 1; u < kSets; ++u) set[u][a][b] = V{};
    }
  }
  const auto step = [&](int64_t at, V(&sums)[kX][kY]) __attribute__((always_inline)) {
    GRADPROJ_UNROLL for (int v = 0; v < Row::kVectors; ++v) {
      V vx[kX], vy[kY];
      GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) vx[a] = Row::load(x[a] + at, v);
      if (!kTriangle) GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) vy[b] = Row::load(y[b] + at, v);
      GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
        GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) sums[a][b] += vx[a] * (kTriangle ? vx[b] : vy[b]);
    }
  };
  int64_t at = 0;
  for (; at + kSteps * Row::kElements <= n; at += kSteps * Row::kElements)
    GRADPROJ_UNROLL for (int u = 0; u < kSteps; ++u) step(at + u * Row::kElements, set[u % kSets]);
  for (; at < n; at += Row::kElements) step(at, set[0]);
  GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a)
    GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) {
      GRADPROJ_UNROLL for (int u = 1; u < kSets; ++u) set[0][a][b] += set[u][a][b];
      vectors[p++] = set[0][a][b];
    }
}

// Up to kBlock rows: each is read once, and the sums stay in registers for as long as a chain may be.
template <typename T, typename S, int kRows>
void gram_one_block(const S* const* rows, int64_t n, PairSum* sums) {
  using Row = Step<T, S, false>;
  constexpr int kPairs = kRows * (kRows + 1) / 2;
  // Up to two rows are summed in four sets (see block), each of which takes kChain additions.
  constexpr int64_t kRun = kChain / Row::kVectors * Row::kElements * (kRows <= 2 ? 4 : 1);
  for (int64_t at = 0; at < n; at += kRun) {
    typename Row::V vectors[kPairs];
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) vectors[p] = typename Row::V{};
    block<T, S, kRows, kRows, true>(rows, rows, at, at_most(n - at, kRun), vectors);
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) widen<T>(vectors[p], sums[p]);
  }
}

// All pairs of any number of rows over n elements from begin, block by block, to vectors in that order.
template <typename T, typename S>
inline void add_blocks(const S* const* rows, int num_rows, int64_t begin, int64_t n, typename Vector<T>::type* vectors) {
  for (int i = 0; i < num_rows; i += kBlock) {
    with_count<kBlock>(at_most(num_rows - i, kBlock), [&](auto count) {
      constexpr int kX = decltype(count)::value;
      block<T, S, kX, kX, true>(rows + i, rows + i, begin, n, vectors);
      vectors += kX * (kX + 1) / 2;
    });
    for (int j = i + kBlock; j < num_rows; j += kBlock)
      with_count<kBlock>(at_most(num_rows - j, kBlock), [&](auto count) {
        constexpr int kY = decltype(count)::value;
        block<T, S, kBlock, kY, false>(rows + i, rows + j, begin, n, vectors);
        vectors += kBlock * kY;
      });
  }
}

template <typename T, typename S>
void gram_blocks(const S* const* rows, int num_rows, int64_t n, PairSum* sums) {
  using Row = Step<T, S, false>;
  constexpr int64_t kRun = kChain / Row::kVectors * Row::kElements, kTileElements = kBlockTile / static_cast<int64_t>(sizeof(S));
  const int pairs = num_rows * (num_rows + 1) / 2;
  auto* vectors = reinterpret_cast<typename Row::V*>(sums + pairs);
  for (int64_t at = 0; at < n;) {
    const int64_t stop = at + at_most(n - at, kRun);
    for (int p = 0; p < pairs; ++p) vectors[p] = typename Row::V{};
    for (; at < stop; at += kTileElements) add_blocks<T, S>(rows, num_rows, at, at_most(stop - at, kTileElements), vectors);
    at = stop;
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
constexpr int kGroup = 8;

// <g, g> if kOwn, and <g, rows[r]>, over elements begin to end.
template <typename T, typename G, typename S, int kRows, bool kOwn>
inline void row_products(const G* g, const void* const* rows, int64_t begin, int64_t end, PairSum& own_sum, PairSum* sums) {
  using First = Step<T, G, !std::is_same_v<G, S>>;
  using Other = Step<T, S, !std::is_same_v<G, S>>;
  using V = typename First::V;
  constexpr int kSets = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
  constexpr int64_t kBody = kSets * First::kElements, kRun = kChain / First::kVectors * kBody;
  const S* x[kRows];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) x[r] = static_cast<const S*>(rows[r]);
  for (int64_t at = begin; at < end;) {
    const int64_t stop = end - at < kRun ? end : at + kRun;
    V own[kSets], set[kSets][kRows];
    GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u) {
      own[u] = V{};
      GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) set[u][r] = V{};
    }
    for (; at + kBody <= stop; at += kBody)
      GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u) {
        const int64_t i = at + u * First::kElements;
        V y[First::kVectors];
        GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) {
          y[v] = First::load(g + i, v);
          if (kOwn) own[u] += y[v] * y[v];
        }
        GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
          if (kRows >= 3) prefetch(x[r] + i);
          GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) set[u][r] += y[v] * Other::load(x[r] + i, v);
        }
      }
    GRADPROJ_UNROLL for (int u = 1; u < kSets; ++u) {
      own[0] += own[u];
      GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) set[0][r] += set[u][r];
    }
    if (kOwn) widen<T>(own[0], own_sum);
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) widen<T>(set[0][r], sums[r]);
    for (; at < stop; ++at) {
      const T y = decode(g[at]);
      if (kOwn) own_sum.lanes[0] += static_cast<double>(y * y);
      for (int r = 0; r < kRows; ++r) sums[r].lanes[0] += static_cast<double>(y * decode(x[r][at]));
    }
  }
}

// The pairs of row 0 with rows 0 .. num_rows - 1. Several groups read the gradient again, so they take a tile at a time.
template <typename T, typename G, typename S>
void gram_row(const void* const* rows, int num_rows, int64_t n, PairSum* sums) {
  const G* g = static_cast<const G*>(rows[0]);
  const int64_t step = num_rows <= 1 + kGroup ? n : kTile;
  for (int64_t at = 0; at < n; at += step) {
    const int64_t end = n - at < step ? n : at + step;
    for (int r = 1; r < num_rows; r += kGroup)
      with_count<kGroup>(num_rows - r < kGroup ? num_rows - r : kGroup, [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        if (r == 1)
          row_products<T, G, S, kRows, true>(g, rows + r, at, end, sums[0], sums + r);
        else
          row_products<T, G, S, kRows, false>(g, rows + r, at, end, sums[0], sums + r);
      });
  }
}

template <typename T, typename G, typename S>
void gram(const void* const* rows, int num_rows, int64_t n, bool row_only, PairSum* sums) {
  if (row_only && num_rows > 1) return gram_row<T, G, S>(rows, num_rows, n, sums);
  if constexpr (std::is_same_v<G, S>) gram_full<T, S>(reinterpret_cast<const S* const*>(rows), num_rows, n, sums);
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

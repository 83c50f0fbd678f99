// Inner products. Part of kernels_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

// Order of summation of one pair over n elements. It is the same in every kernel here and for any number of rows, so the product
// of two rows depends on nothing but them:
//   a chain adds kSteps steps, lane by lane, from zero;
//   a section of kChains * kSteps steps has chain c take step c and every kChains-th after it; what is left of a tile after its last
//   section is in chains of neighbouring steps;
//   the chains of a tile are added up in their order, and tiles in double.
// A kernel of few rows walks the chains of a section side by side, because an addition waits for the one before it.
//
// Of equal elements every float32 addition may round the same way. At most 40 of them, 8 in a chain and 32 chains, cost 7e-7.
constexpr int kSteps = 8;
constexpr int kChains = 4;

// Rows of a block. Its sums and rows have to fit the registers: 16 of them, or AVX-512's 32.
constexpr int kBlock = GRADPROJ_VECTOR_BYTES == 64 ? 5 : 3;

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// Calls add(count, at, stride, steps) for all chains of elements [begin, end), part of a tile from a section's start on: `count`
// of them at a time, a constant, the first from element `at` on in steps of `stride` elements, each further one a step behind.
template <typename Row, int kSets, typename F>
inline __attribute__((always_inline)) void for_chains(int64_t begin, int64_t end, const F& add) {
  constexpr int64_t kStep = Row::kElements, kSection = kChains * kSteps * kStep;
  static_assert(kTile % kSection == 0);
  for (; begin + kSection <= end; begin += kSection)
    for (int c = 0; c < kChains; c += kSets) add(Count<kSets>{}, begin + c * kStep, kChains * kStep, kSteps);
  for (; begin < end; begin += kSteps * kStep)
    add(Count<1>{}, begin, kStep, static_cast<int>(at_most((end - begin) / kStep, kSteps)));
}

// Adds the products of kX rows x with kY rows y in kSets chains to a vector per pair; if kTriangle, y is x and only pairs a <= b
// count. Each load serves several products.
template <typename T, typename S, int kX, int kY, bool kTriangle, int kSets>
inline void block(const S* const* x_rows, const S* const* y_rows, int64_t at, int64_t stride, int steps,
                  typename Vector<T>::type* vectors) {
  using Row = Step<T, S, false>;
  using V = typename Row::V;
  const S *x[kX], *y[kY];
  V set[kSets][kX][kY];
  GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) x[a] = x_rows[a] + at;
  GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) y[b] = y_rows[b] + at;
  GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u)
    GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
      GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) set[u][a][b] = V{};
  for (int64_t i = 0; i < steps * stride; i += stride)
    GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u)
      GRADPROJ_UNROLL for (int v = 0; v < Row::kVectors; ++v) {
        V vx[kX], vy[kY];
        GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) vx[a] = Row::load(x[a] + i + u * Row::kElements, v);
        if (!kTriangle) GRADPROJ_UNROLL for (int b = 0; b < kY; ++b) vy[b] = Row::load(y[b] + i + u * Row::kElements, v);
        GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
          GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) set[u][a][b] += vx[a] * (kTriangle ? vx[b] : vy[b]);
      }
  GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u)
    GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a)
      GRADPROJ_UNROLL for (int b = kTriangle ? a : 0; b < kY; ++b) vectors[p++] += set[u][a][b];
}

// Up to kBlock rows: each is read once.
template <typename T, typename S, int kRows>
void gram_one_block(const S* const* rows, int64_t n, PairSum* sums) {
  using V = typename Vector<T>::type;
  constexpr int kPairs = kRows * (kRows + 1) / 2;
  for (int64_t tile = 0; tile < n; tile += kTile) {
    V vectors[kPairs];
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) vectors[p] = V{};
    for_chains<Step<T, S, false>, kPairs <= 3 ? 4 : kPairs <= 6 ? 2 : 1>(
        tile, tile + at_most(n - tile, kTile), [&](auto count, int64_t at, int64_t stride, int steps) __attribute__((always_inline)) {
          block<T, S, kRows, kRows, true, decltype(count)::value>(rows, rows, at, stride, steps, vectors);
        });
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) widen<T>(vectors[p], sums[p]);
  }
}

// All pairs of any number of rows in one chain, block by block, to vectors in that order.
template <typename T, typename S>
inline void add_blocks(const S* const* rows, int num_rows, int64_t at, int64_t stride, int steps, typename Vector<T>::type* vectors) {
  for (int i = 0; i < num_rows; i += kBlock) {
    with_count<kBlock>(at_most(num_rows - i, kBlock), [&](auto count) {
      constexpr int kX = decltype(count)::value;
      block<T, S, kX, kX, true, 1>(rows + i, rows + i, at, stride, steps, vectors);
      vectors += kX * (kX + 1) / 2;
    });
    for (int j = i + kBlock; j < num_rows; j += kBlock)
      with_count<kBlock>(at_most(num_rows - j, kBlock), [&](auto count) {
        constexpr int kY = decltype(count)::value;
        block<T, S, kBlock, kY, false, 1>(rows + i, rows + j, at, stride, steps, vectors);
        vectors += kBlock * kY;
      });
  }
}

// All blocks go through a chain before they go on: its elements are in L1 for all of them, and the processor's prefetchers see all
// rows advance side by side.
template <typename T, typename S>
void gram_blocks(const S* const* rows, int num_rows, int64_t n, PairSum* sums) {
  using V = typename Vector<T>::type;
  const int pairs = num_rows * (num_rows + 1) / 2;
  V* vectors = reinterpret_cast<V*>(sums + pairs);
  for (int64_t tile = 0; tile < n; tile += kTile) {
    for (int p = 0; p < pairs; ++p) vectors[p] = V{};
    for_chains<Step<T, S, false>, 1>(tile, tile + at_most(n - tile, kTile), [&](auto, int64_t at, int64_t stride, int steps) {
      add_blocks<T, S>(rows, num_rows, at, stride, steps, vectors);
    });
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
  for_chains<First, kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1>(
      begin, end, [&](auto count, int64_t at, int64_t stride, int steps) __attribute__((always_inline)) {
        constexpr int kSets = decltype(count)::value;
        V own_set[kSets], set[kSets][kRows];
        GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u) {
          own_set[u] = V{};
          GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) set[u][r] = V{};
        }
        for (int64_t first = at; first < at + steps * stride; first += stride)
          GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u) {
            const int64_t i = first + u * First::kElements;
            V y[First::kVectors];
            GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) {
              y[v] = First::load(g + i, v);
              if (kOwn) own_set[u] += y[v] * y[v];
            }
            GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
              if (kRows >= 3) prefetch(x[r] + i);
              GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) set[u][r] += y[v] * Other::load(x[r] + i, v);
            }
          }
        GRADPROJ_UNROLL for (int u = 0; u < kSets; ++u) {
          if (kOwn) own += own_set[u];
          GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) products[r] += set[u][r];
        }
      });
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
    for (int r = 1; r < num_rows; r += kGroup)
      with_count<kGroup>(num_rows - r < kGroup ? num_rows - r : kGroup, [&](auto count) {
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

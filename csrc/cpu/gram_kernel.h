// Inner products. Included by kernels_impl.h.

// Order of summation of one pair over n elements, the same for any number of rows, so that the product of two rows
// depends on nothing but them: lane by lane over the vectors of a run, from zero; runs ascending, in double; then what
// fills no vector. Of 16-bit rows a step's even elements come before its odd ones.
//
// Of equal elements every float32 addition may round the same way: then the 48 of a run cost 8e-7 of the sum.
constexpr int kChain = 48;
template <typename Row>
constexpr int64_t kRun = kChain / Row::kVectors * Row::kElements;

// Rows of a block. Its sums and rows have to fit the registers: 16 of them, or AVX-512's 32.
constexpr int kBlock = GRADPROJ_VECTOR_BYTES == 64 ? 5 : 3;
// Directions that are read in step with the gradient: what 16 registers hold.
constexpr int kRowsAtOnce = 8;

// Bytes of each row that all blocks go through before they go on. So little, because the processor's prefetchers then
// see all rows advance side by side, and run ahead of them while the blocks compute.
constexpr int64_t kBlockTile = 512;

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// Adds the products of kX rows x with kY rows y over elements [begin, end), part of a run, to a vector per pair. kOwn:
// the first kX rows of y are x, and only pairs a <= b count. Each load serves several products.
template <typename T, typename G, typename S, int kX, int kY, bool kOwn>
inline void block(const void* const* x_rows, const void* const* y_rows, int64_t begin, int64_t end,
                  typename Vector<T>::type* vectors) {
  using First = Step<T, G, !std::is_same_v<G, S>>;
  using Other = Step<T, S, !std::is_same_v<G, S>>;
  using V = typename First::V;
  constexpr int kFirstLoaded = kOwn ? kX : 0;
  const G* x[kX];
  const S* y[kY];
  V sums[kX][kY];
  GRADPROJ_UNROLL for (int b = kFirstLoaded; b < kY; ++b) y[b] = static_cast<const S*>(y_rows[b]);
  GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a) {
    x[a] = static_cast<const G*>(x_rows[a]);
    GRADPROJ_UNROLL for (int b = kOwn ? a : 0; b < kY; ++b) sums[a][b] = vectors[p++];
  }
  const auto step = [&](int64_t at) __attribute__((always_inline)) {
    if (kX == 1 && kY - kFirstLoaded >= 3)
      GRADPROJ_UNROLL for (int b = kFirstLoaded; b < kY; ++b) prefetch(y[b] + at);
    GRADPROJ_UNROLL for (int v = 0; v < First::kVectors; ++v) {
      V vx[kX], vy[kY];
      GRADPROJ_UNROLL for (int a = 0; a < kX; ++a) vx[a] = First::load(x[a] + at, v);
      GRADPROJ_UNROLL for (int b = kFirstLoaded; b < kY; ++b) vy[b] = Other::load(y[b] + at, v);
      GRADPROJ_UNROLL for (int a = 0; a < kX; ++a)
        GRADPROJ_UNROLL for (int b = kOwn ? a : 0; b < kY; ++b)
          sums[a][b] += vx[a] * (b < kFirstLoaded ? vx[b] : vy[b]);
    }
  };
  int64_t at = begin;
  for (; at + 2 * First::kElements <= end; at += 2 * First::kElements) step(at), step(at + First::kElements);
  for (; at < end; at += First::kElements) step(at);
  GRADPROJ_UNROLL for (int a = 0, p = 0; a < kX; ++a)
    GRADPROJ_UNROLL for (int b = kOwn ? a : 0; b < kY; ++b) vectors[p++] = sums[a][b];
}

// The same over any number of runs, whose sums stay in registers until they are added to `sums`.
template <typename T, typename G, typename S, int kX, int kY, bool kOwn>
void block_runs(const void* const* x_rows, const void* const* y_rows, int64_t begin, int64_t end, PairSum* sums) {
  constexpr int kPairs = kX * kY - (kOwn ? kX * (kX - 1) / 2 : 0);
  constexpr int64_t kLength = kRun<Step<T, G, !std::is_same_v<G, S>>>;
  static_assert(kTile % kLength == 0, "a row that goes through tiles has the same runs as one that does not");
  for (int64_t at = begin; at < end; at += kLength) {
    typename Vector<T>::type vectors[kPairs];
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) vectors[p] = typename Vector<T>::type{};
    block<T, G, S, kX, kY, kOwn>(x_rows, y_rows, at, at + at_most(end - at, kLength), vectors);
    GRADPROJ_UNROLL for (int p = 0; p < kPairs; ++p) widen<T>(vectors[p], sums[p]);
  }
}

// Row 0 with every row, itself included. The tiles let row 0 stay in cache for the next rows.
template <typename T, typename G, typename S>
void gram_row(const void* const* rows, int num_rows, int64_t n, PairSum* sums) {
  constexpr int kFirst = 1 + kRowsAtOnce;
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t end = at + at_most(n - at, kTile);
    with_count<kFirst>(at_most(num_rows, kFirst), [&](auto count) {
      block_runs<T, G, S, 1, decltype(count)::value, true>(rows, rows, at, end, sums);
    });
    for (int r = kFirst; r < num_rows; r += kRowsAtOnce)
      with_count<kRowsAtOnce>(at_most(num_rows - r, kRowsAtOnce), [&](auto count) {
        block_runs<T, G, S, 1, decltype(count)::value, false>(rows, rows + r, at, end, sums + r);
      });
  }
}

// All pairs of more rows than a block has, block by block in the order of pair_place. The sums of a run are in the
// scratch after `sums`.
template <typename T, typename S>
void gram_blocks(const void* const* rows, int num_rows, int64_t n, PairSum* sums) {
  using V = typename Vector<T>::type;
  constexpr int64_t kLength = kRun<Step<T, S, false>>, kTileLength = kBlockTile / static_cast<int64_t>(sizeof(S));
  const int pairs = num_rows * (num_rows + 1) / 2;
  V* const vectors = reinterpret_cast<V*>(sums + pairs);
  for (int64_t at = 0; at < n;) {
    const int64_t run_end = at + at_most(n - at, kLength);
    for (int p = 0; p < pairs; ++p) vectors[p] = V{};
    while (at < run_end) {
      const int64_t end = at + at_most(run_end - at, kTileLength);
      V* next = vectors;
      for (int i = 0; i < num_rows; i += kBlock) {
        with_count<kBlock>(at_most(num_rows - i, kBlock), [&](auto count) {
          constexpr int kX = decltype(count)::value;
          block<T, S, S, kX, kX, true>(rows + i, rows + i, at, end, next);
          next += kX * (kX + 1) / 2;
        });
        for (int j = i + kBlock; j < num_rows; j += kBlock)
          with_count<kBlock>(at_most(num_rows - j, kBlock), [&](auto count) {
            constexpr int kY = decltype(count)::value;
            block<T, S, S, kBlock, kY, false>(rows + i, rows + j, at, end, next);
            next += kBlock * kY;
          });
      }
      at = end;
    }
    for (int p = 0; p < pairs; ++p) widen<T>(vectors[p], sums[p]);
  }
}

template <typename T, typename G, typename S>
void gram(const void* const* rows, int num_rows, int64_t n, bool row_only, PairSum* sums) {
  const int64_t whole = n - n % Step<T, G, !std::is_same_v<G, S>>::kElements;
  if (row_only)
    gram_row<T, G, S>(rows, num_rows, whole, sums);
  else if constexpr (std::is_same_v<G, S>) {
    if (num_rows > kBlock)
      gram_blocks<T, S>(rows, num_rows, whole, sums);
    else
      with_count<kBlock>(num_rows, [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        block_runs<T, S, S, kRows, kRows, true>(rows, rows, 0, whole, sums);
      });
  }
  auto element = [&](int row, int64_t i) {
    return row == 0 ? T(decode(static_cast<const G*>(rows[0])[i])) : T(decode(static_cast<const S*>(rows[row])[i]));
  };
  for (int64_t i = whole; i < n; ++i)
    for (int a = 0; a < (row_only ? 1 : num_rows); ++a)
      for (int b = a; b < num_rows; ++b)
        sums[row_only ? b : pair_place(kBlock, num_rows, a, b)].lanes[0] += element(a, i) * element(b, i);
}

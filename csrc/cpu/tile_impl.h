// Included by tile_portable.cpp, tile_avx2.cpp and tile_avx512.cpp, each under its own target and with its own
// GRADPROJ_ISA and GRADPROJ_VECTOR_BYTES. Vectors are the compiler's vector extension, so one source serves every processor.
// Beyond 16 bytes they are x86's, with f16c's conversions; compilers do not agree on telling so by __F16C__ inside a pragma.
// No header that defines inline functions may be included from here: the linker would keep one instruction set's copy for all.

// Before loops of constant length over arrays that are to live in registers: gcc leaves an array in memory if it keeps one loop.
#if defined(__clang__)
#define GRADPROJ_UNROLL _Pragma("unroll")
#else
#define GRADPROJ_UNROLL _Pragma("GCC unroll 16")
#endif

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

template <typename T>
struct Vector {
  static constexpr int kWidth = GRADPROJ_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(GRADPROJ_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef T unaligned_for_2 __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), aligned(2), may_alias));
};

// bfloat16 is the upper half of a float.
inline float from_bf16(uint16_t h) { return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float f) {
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : rounded);
}

// A step of a row: the elements that one load takes, as one or two vectors of T.
template <typename T, typename S>
struct Lane {  // S == T
  using V = typename Vector<T>::type;
  static constexpr int kVectors = 1;
  static constexpr int kElements = Vector<T>::kWidth;
  static inline void load(const S* p, V (&out)[1]) { out[0] = *reinterpret_cast<const typename Vector<T>::unaligned*>(p); }
  static inline void store(S* p, const V (&in)[1]) { *reinterpret_cast<typename Vector<T>::unaligned*>(p) = in[0]; }
  static inline T get(S x) { return x; }
  static inline S put(T x) { return x; }
};

// Even and odd elements apart: widening is then one shift and one mask on whole vectors.
template <>
struct Lane<float, BF16> {
  using V = Vector<float>::type;
  using U = Vector<uint32_t>::type;
  static constexpr int kVectors = 2;
  static constexpr int kElements = 2 * Vector<float>::kWidth;
  static inline void load(const BF16* p, V (&out)[2]) {
    const U raw = *reinterpret_cast<const Vector<uint32_t>::unaligned_for_2*>(p);
    out[0] = reinterpret_cast<V>(raw << 16);
    out[1] = reinterpret_cast<V>(raw & 0xffff0000u);
  }
  // In the upper half of each word; round to nearest even, NaN stays NaN.
  static inline U rounded(V x) {
    const U u = reinterpret_cast<U>(x);
    return x != x ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u);
  }
  static inline void store(BF16* p, const V (&in)[2]) {
    *reinterpret_cast<Vector<uint32_t>::unaligned_for_2*>(p) = rounded(in[0]) >> 16 | (rounded(in[1]) & 0xffff0000u);
  }
  static inline float get(BF16 x) { return from_bf16(x.bits); }
  static inline BF16 put(float x) { return {to_bf16(x)}; }
};

// Adds factor times a vector's lanes to kLanes float64 sums, lane l to sum l modulo kLanes: the order depends on the vector's
// width alone.
template <typename T>
inline void flush(typename Vector<T>::type v, double* acc, double factor = 1.0) {
  constexpr int kStep = Vector<double>::kWidth;
  typedef T part __attribute__((vector_size(kStep * sizeof(T)), may_alias));
  GRADPROJ_UNROLL for (int l = 0; l < Vector<T>::kWidth; l += kStep)
    *reinterpret_cast<Vector<double>::unaligned*>(acc + l % kLanes) +=
        __builtin_convertvector(reinterpret_cast<const part*>(&v)[l / kStep], Vector<double>::type) * factor;
}

// With many rows a tile of each is about a page, and the processor's own prefetcher starts anew on every page: whoever touches
// a row first asks for what it will need next. Past the end of a buffer a prefetch does nothing.
template <typename S>
inline void prefetch(const S* p) {
  __builtin_prefetch(p, 0, 2);
}

// Products of kX rows with kY others over elements begin to end, pair (a, b) added to acc + at(a, b) * kLanes; with kTriangle
// the others are the rows themselves and only a <= b counts. Rows are taken in blocks so that each load serves several products.
template <typename T, typename S, int kX, int kY, bool kTriangle, int kUnroll, typename At>
inline void products(const S* const* x, const S* const* y, int64_t begin, int64_t end, double* acc, const At& at) {
  using L = Lane<T, S>;
  using V = typename L::V;
  constexpr int64_t kStep = kUnroll * L::kElements;
  static_assert(kTile % kStep == 0, "only the last tile has a tail");
  for (int64_t i = begin; i < end;) {
    const int64_t stop = end - i < kTile ? end : i + kTile;
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
    case 1: return products<T, S, kX, 1, false, 2>(x, y, begin, end, acc, at);
    case 2: return products<T, S, kX, 2, false, 2>(x, y, begin, end, acc, at);
    default: return products<T, S, kX, 3, false, 1>(x, y, begin, end, acc, at);
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
    if (height == 1) products<T, S, 1, 1, true, 4>(x, x, begin, end, acc, diagonal);
    if (height == 2) products<T, S, 2, 2, true, 4>(x, x, begin, end, acc, diagonal);
    if (height == 3) products<T, S, 3, 3, true, 2>(x, x, begin, end, acc, diagonal);
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

// Calls f with a compile-time count.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <typename F>
inline void with_count(int n, const F& f) {
  switch (n) {
    case 0: return f(Count<0>{});
    case 1: return f(Count<1>{});
    case 2: return f(Count<2>{});
    case 3: return f(Count<3>{});
    case 4: return f(Count<4>{});
    case 5: return f(Count<5>{});
    case 6: return f(Count<6>{});
    case 7: return f(Count<7>{});
    case 8: return f(Count<8>{});
    default: return f(Count<9>{});
  }
}

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
    return with_count(num_rows, [&](auto c) {
      constexpr int kRows = decltype(c)::value;
      if constexpr (kRows > 0) combine_rows<T, S, kRows>(out, rows, weights, n);
    });
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

#if GRADPROJ_VECTOR_BYTES == 16
// Branch-free, exact: the exponent is rebased by a multiplication, which also normalises subnormals.
inline float from_f16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * __builtin_bit_cast(float, 0x77800000u);  // 2^112
  const uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | infinite | static_cast<uint32_t>(h & 0x8000u) << 16);
}

// Round to nearest even; overflow to infinity, NaN stays NaN, subnormals are rounded at their own spacing.
inline uint16_t to_f16(float f) {
  const uint32_t u = __builtin_bit_cast(uint32_t, f), magnitude = u & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // adding 0.5 puts the units of a float16 subnormal in the float's last bits
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}
#endif

// f(i, count) for one cache line of s after the other, asking for the line that the next tile will want: with many rows the
// processor's own prefetcher does not keep up. All counts but the last are the same constant.
template <typename S, typename F>
inline void in_lines(const S* s, int64_t n, const F& f) {
  constexpr int64_t kLine = 64 / sizeof(S);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    prefetch(s + i + kTile);
    f(i, kLine);
  }
  f(i, n - i);
}

template <typename T, typename S>
inline void convert(const char* source, T* out, int64_t n) {
  const S* s = reinterpret_cast<const S*>(source);
  in_lines(s, n, [&](int64_t start, int64_t count) {
    for (int64_t i = start; i < start + count; ++i) out[i] = static_cast<T>(s[i]);
  });
}

template <typename T>
void load_f16(const uint16_t* s, T* out, int64_t n) {
  in_lines(s, n, [&](int64_t i, int64_t count) {
    const int64_t stop = i + count;
#if GRADPROJ_VECTOR_BYTES > 16
    for (; i + 8 <= stop; i += 8) {
      const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
      for (int l = 0; l < 8; ++l) out[i + l] = static_cast<T>(wide[l]);
    }
    for (; i < stop; ++i) out[i] = static_cast<T>(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(s[i]))));
#else
    for (; i < stop; ++i) out[i] = static_cast<T>(from_f16(s[i]));
#endif
  });
}

template <typename T>
void store_f16(const T* s, uint16_t* out, int64_t n) {
#if GRADPROJ_VECTOR_BYTES > 16
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 wide;
    for (int l = 0; l < 8; ++l) wide[l] = static_cast<float>(s[i + l]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i)
    out[i] = static_cast<uint16_t>(
        _mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(static_cast<float>(s[i])), _MM_FROUND_TO_NEAREST_INT)));
#else
  for (int64_t i = 0; i < n; ++i) out[i] = to_f16(static_cast<float>(s[i]));
#endif
}

// e4m3fn: rebased by a multiplication like float16; no infinity, one NaN.
inline float from_f8(uint8_t code) {
  const uint32_t magnitude = static_cast<uint32_t>(code & 0x7fu) << 20;
  const float scaled = __builtin_bit_cast(float, magnitude) * __builtin_bit_cast(float, 0x7b800000u);  // 2^120
  const uint32_t nan = magnitude == 0x07f00000u ? 0x7fc00000u : 0u;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | nan | static_cast<uint32_t>(code & 0x80u) << 24);
}

inline bool any_nan_f8(const uint8_t* s, int64_t n) {
  uint8_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<uint8_t>((s[i] & 0x7fu) == 0x7fu);
  return found;
}

// A vector of float32 out of consecutive elements of S, and one element. kFactor: what is left to multiply them with.
template <typename S>
struct Decode;

template <>
struct Decode<float> {
  using V = Vector<float>::type;
  static constexpr float kFactor = 1.0f;
  static inline V load(const float* p) { return *reinterpret_cast<const Vector<float>::unaligned*>(p); }
  static inline float get(float x) { return x; }
};

template <>
struct Decode<BF16> {
  using V = Vector<float>::type;
  static constexpr float kFactor = 1.0f;
  typedef uint16_t halves __attribute__((vector_size(GRADPROJ_VECTOR_BYTES / 2), aligned(2), may_alias));
  static inline V load(const BF16* p) {
    return reinterpret_cast<V>(__builtin_convertvector(*reinterpret_cast<const halves*>(p), Vector<uint32_t>::type) << 16);
  }
  static inline float get(BF16 x) { return from_bf16(x.bits); }
};

template <>
struct Decode<F16> {
  using V = Vector<float>::type;
  static constexpr float kFactor = 1.0f;
  static inline V load(const F16* p) {
#if GRADPROJ_VECTOR_BYTES == 64
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif GRADPROJ_VECTOR_BYTES > 16
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V v;
    for (int l = 0; l < Vector<float>::kWidth; ++l) v[l] = get(p[l]);
    return v;
#endif
  }
  static inline float get(F16 x) {
#if GRADPROJ_VECTOR_BYTES > 16
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#else
    return from_f16(x.bits);
#endif
  }
};

// A code shifted into the place of a float16 is that number times 2^-8, subnormals included, which the processor converts at
// full speed. Only the NaN has no place there: whoever loads vectors has looked for it.
template <>
struct Decode<F8> {
  using V = Vector<float>::type;
#if GRADPROJ_VECTOR_BYTES > 16
  static constexpr float kFactor = 256.0f;
#else
  static constexpr float kFactor = 1.0f;
#endif
  static inline V load(const F8* p) {
#if GRADPROJ_VECTOR_BYTES == 64
    const __m256i word = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(word, _mm256_set1_epi16(static_cast<short>(0xbf80))));
#elif GRADPROJ_VECTOR_BYTES > 16
    const __m128i word = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
    return _mm256_cvtph_ps(_mm_and_si128(word, _mm_set1_epi16(static_cast<short>(0xbf80))));
#else
    V v;
    for (int l = 0; l < Vector<float>::kWidth; ++l) v[l] = from_f8(p[l].bits);
    return v;
#endif
  }
  static inline float get(F8 x) { return from_f8(x.bits) * (1.0f / kFactor); }
};

// f(start, n, block) for runs of elements that share a scale, or for tiles where there are no scales.
template <typename S, typename F>
inline void for_each_block(int64_t start, int64_t n, const F& f) {
  constexpr int64_t kBlock = sizeof(S) == 1 ? kScaleBlock : kTile;
  for (const int64_t end = start + n; start < end;) {
    const int64_t left = kBlock - start % kBlock, count = end - start < left ? end - start : left;
    f(start, count, start / kBlock);
    start += count;
  }
}

// Up to kGroup rows of a block, each with a factor: what 16 registers hold beside the gradient.
constexpr int kGroup = 8;

template <typename S>
struct Group {
  int count;
  const S* x[kGroup];
  float factor[kGroup];  // what a decoded element is to be multiplied with

  Group(const void* const* rows, const float* const* scales, int count, int64_t at, int64_t block) : count(count) {
    for (int r = 0; r < count; ++r) {
      x[r] = static_cast<const S*>(rows[r]) + at;
      factor[r] = Decode<S>::kFactor * (sizeof(S) == 1 ? scales[r][block] : 1.0f);
    }
  }
  bool vectors_hold(int64_t n) const {
    bool hold = true;
    if constexpr (sizeof(S) == 1)
      for (int r = 0; r < count; ++r) hold = hold && !any_nan_f8(reinterpret_cast<const uint8_t*>(x[r]), n);
    return hold;
  }
};

// Asks for the next tile's lines of rows that walk in step, once per line.
template <int kRows, typename S>
inline void prefetch_rows(const S* const* x, int64_t i) {
  if (i % (64 / static_cast<int64_t>(sizeof(S))) == 0)
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) prefetch(x[r] + i + kTile);
}

template <typename S, int kRows, bool kOwn>
inline void stored_products_of(const float* g, const Group<S>& group, int64_t n, double* own_acc, double* acc) {
  using V = Vector<float>::type;
  using D = Decode<S>;
  constexpr int kWidth = Vector<float>::kWidth;
  const S* x[kRows + 1];
  V own = {}, sums[kRows + 1];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
    x[r] = group.x[r];
    sums[r] = V{};
  }
  int64_t i = 0;
  if (group.vectors_hold(n))
    for (; i + kWidth <= n; i += kWidth) {
      prefetch_rows<kRows>(x, i);
      const V y = Decode<float>::load(g + i);
      if (kOwn) own += y * y;
      GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) sums[r] += D::load(x[r] + i) * y;
    }
  if (kOwn) flush<float>(own, own_acc);
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) flush<float>(sums[r], acc + r * kLanes, group.factor[r]);
  for (; i < n; ++i) {
    if (kOwn) own_acc[0] += static_cast<double>(g[i] * g[i]);
    for (int r = 0; r < kRows; ++r)
      acc[r * kLanes] += static_cast<double>(D::get(x[r][i]) * g[i]) * static_cast<double>(group.factor[r]);
  }
}

template <typename S>
void stored_products(const float* g, const void* const* rows, const float* const* scales, int num_rows, int64_t start, int64_t n,
                     double* acc) {
  for_each_block<S>(start, n, [&](int64_t at, int64_t count, int64_t block) {
    for (int r = 0; r < num_rows; r += kGroup) {
      const Group<S> group(rows + r, scales + r, num_rows - r < kGroup ? num_rows - r : kGroup, at, block);
      double* pairs = acc + (1 + r) * kLanes;
      with_count(group.count, [&](auto c) {
        constexpr int kRows = decltype(c)::value;
        if (r == 0)
          stored_products_of<S, kRows, true>(g + (at - start), group, count, acc, pairs);
        else
          stored_products_of<S, kRows, false>(g + (at - start), group, count, acc, pairs);
      });
    }
  });
}

template <typename S, int kRows>
inline void stored_combine_of(float* out, const float* g, float weight, const Group<S>& group, const float* weights, int64_t n) {
  using V = Vector<float>::type;
  using D = Decode<S>;
  constexpr int kWidth = Vector<float>::kWidth;
  const S* x[kRows + 1];
  float w[kRows + 1];
  GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) {
    x[r] = group.x[r];
    w[r] = weights[r] * group.factor[r];
  }
  int64_t i = 0;
  if (group.vectors_hold(n))
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
void stored_combine(float* out, const float* g, float weight, const void* const* rows, const float* const* scales,
                    const float* weights, int num_rows, int64_t start, int64_t n) {
  for_each_block<S>(start, n, [&](int64_t at, int64_t count, int64_t block) {
    const float* source = g + (at - start);
    float* target = out + (at - start);
    float first = weight;
    for (int r = 0; r < num_rows; r += kGroup) {
      const Group<S> group(rows + r, scales + r, num_rows - r < kGroup ? num_rows - r : kGroup, at, block);
      with_count(group.count, [&](auto c) {
        stored_combine_of<S, decltype(c)::value>(target, source, first, group, weights + r, count);
      });
      source = target;
      first = 1.0f;
    }
  });
}

// One block's codes, all with one scale.
template <typename T>
inline void load_f8(const uint8_t* codes, float scale, T* out, int64_t n) {
  if constexpr (sizeof(T) == 4)
    if (!any_nan_f8(codes, n)) {
      using D = Decode<F8>;
      const F8* s = reinterpret_cast<const F8*>(codes);
      const float factor = scale * D::kFactor;
      return in_lines(s, n, [&](int64_t i, int64_t count) {
        const int64_t stop = i + count;
        for (; i + Vector<float>::kWidth <= stop; i += Vector<float>::kWidth)
          *reinterpret_cast<Vector<float>::unaligned*>(out + i) = D::load(s + i) * factor;
        for (; i < stop; ++i) out[i] = D::get(s[i]) * factor;
      });
    }
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_f8(codes[i])) * static_cast<T>(scale);
}

template <typename T>
void load_blocks(const char* codes, const float* scales, int64_t start, T* out, int64_t n) {
  for_each_block<F8>(start, n, [&](int64_t at, int64_t count, int64_t block) {
    load_f8<T>(reinterpret_cast<const uint8_t*>(codes) + at, scales[block], out + (at - start), count);
  });
}

template <typename T>
void load_tile(const char* source, DType dtype, T* out, int64_t n) {
  switch (dtype) {
    case DType::f8: return load_f8<T>(reinterpret_cast<const uint8_t*>(source), 1.0f, out, n);
    case DType::f32: return convert<T, float>(source, out, n);
    case DType::f64: return convert<T, double>(source, out, n);
    case DType::f16: return load_f16<T>(reinterpret_cast<const uint16_t*>(source), out, n);
    case DType::bf16: {
      const uint16_t* s = reinterpret_cast<const uint16_t*>(source);
      in_lines(s, n, [&](int64_t start, int64_t count) {
        for (int64_t i = start; i < start + count; ++i) out[i] = static_cast<T>(from_bf16(s[i]));
      });
    }
  }
}

template <typename T>
void store_tile(const T* source, char* out, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::f8: return;  // read only: check_writable refuses it
    case DType::f32: {
      float* o = reinterpret_cast<float*>(out);
      for (int64_t i = 0; i < n; ++i) o[i] = static_cast<float>(source[i]);
      return;
    }
    case DType::f64: {
      double* o = reinterpret_cast<double*>(out);
      for (int64_t i = 0; i < n; ++i) o[i] = static_cast<double>(source[i]);
      return;
    }
    case DType::f16: return store_f16<T>(source, reinterpret_cast<uint16_t*>(out), n);
    case DType::bf16: {
      uint16_t* o = reinterpret_cast<uint16_t*>(out);
      for (int64_t i = 0; i < n; ++i) o[i] = to_bf16(static_cast<float>(source[i]));
    }
  }
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

#define GRADPROJ_QUOTE_(x) #x
#define GRADPROJ_QUOTE(x) GRADPROJ_QUOTE_(x)
#define GRADPROJ_DEFINE_KERNELS(function)                                                              \
  namespace gradproj::cpu {                                                                            \
  const Kernels& function() {                                                                          \
    using namespace GRADPROJ_ISA;                                                                      \
    static constexpr Kernels table = {{gram<float, float>, combine<float, float>},                     \
                                      {gram<double, double>, combine<double, double>},                 \
                                      {gram<float, BF16>, combine<float, BF16>},                       \
                                      {stored_products<BF16>, stored_combine<BF16>},                   \
                                      {stored_products<F16>, stored_combine<F16>},                     \
                                      {stored_products<F8>, stored_combine<F8>},                       \
                                      {load_tile<float>, load_blocks<float>, store_tile<float>},                           \
                                      {load_tile<double>, load_blocks<double>, store_tile<double>},                         \
                                      GRADPROJ_QUOTE(GRADPROJ_ISA)};                                   \
    return table;                                                                                      \
  }                                                                                                    \
  }

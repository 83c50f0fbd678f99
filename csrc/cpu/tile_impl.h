// Included by tile_portable.cpp, tile_avx2.cpp and tile_avx512.cpp, each under its own target and with its own
// GRADPROJ_ISA and GRADPROJ_VECTOR_BYTES. Vectors are the compiler's vector extension, so one source serves every processor.
// Beyond 16 bytes they are x86's, with f16c's conversions; compilers do not agree on telling so by __F16C__ inside a pragma.
// No header that defines inline functions may be included from here: the linker would keep one instruction set's copy for all.

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
    const U nearest = u + 0x7fffu + (u >> 16 & 1u);
    const U nan = reinterpret_cast<U>((u & 0x7fffffffu) > 0x7f800000u);
    return (nan & (u | 0x400000u)) | (~nan & nearest);
  }
  static inline void store(BF16* p, const V (&in)[2]) {
    *reinterpret_cast<Vector<uint32_t>::unaligned_for_2*>(p) = rounded(in[0]) >> 16 | (rounded(in[1]) & 0xffff0000u);
  }
  static inline float get(BF16 x) { return from_bf16(x.bits); }
  static inline BF16 put(float x) { return {to_bf16(x)}; }
};

// Folds a vector's lanes into kLanes float64 sums: lane l goes to l modulo kLanes, so the order depends on the vector's
// width alone.
template <typename T>
inline void flush(typename Vector<T>::type v, double* acc) {
  constexpr int width = Vector<T>::kWidth;
  for (int l = 0; l < width; ++l) acc[l % kLanes] += static_cast<double>(v[l]);
}

// With many rows a tile of each is about a page, and the processor's own prefetcher starts anew on every page: whoever touches
// a row first asks for what it will need next. Past the end of a buffer a prefetch does nothing.
template <typename S>
inline void prefetch(const S* p) {
  __builtin_prefetch(p, 0, 2);
}

// Products of kX rows with kY others, pair (a, b) added to acc + at(a, b) * kLanes; with kTriangle the others are the rows
// themselves and only a <= b counts. Rows are taken in blocks so that each load serves several products.
template <typename T, typename S, int kX, int kY, bool kTriangle, int kUnroll, typename At>
inline void products(const S* const* x, const S* const* y, int64_t n, double* acc, const At& at) {
  using L = Lane<T, S>;
  using V = typename L::V;
  V sums[kUnroll][kX][kY] = {};
  int64_t i = 0;
  for (; i + kUnroll * L::kElements <= n; i += kUnroll * L::kElements)
    for (int u = 0; u < kUnroll; ++u) {
      V vx[kX][L::kVectors], vy[kY][L::kVectors];
      for (int a = 0; a < kX; ++a) {
        L::load(x[a] + i + u * L::kElements, vx[a]);
        if (kTriangle && kX == 3) prefetch(x[a] + i + u * L::kElements + kTile);
      }
      if (!kTriangle)
        for (int b = 0; b < kY; ++b) L::load(y[b] + i + u * L::kElements, vy[b]);
      for (int v = 0; v < L::kVectors; ++v)
        for (int a = 0; a < kX; ++a)
          for (int b = kTriangle ? a : 0; b < kY; ++b) sums[u][a][b] += vx[a][v] * (kTriangle ? vx[b][v] : vy[b][v]);
    }
  for (int a = 0; a < kX; ++a)
    for (int b = kTriangle ? a : 0; b < kY; ++b) {
      V total = sums[0][a][b];
      for (int u = 1; u < kUnroll; ++u) total += sums[u][a][b];
      double* pair = acc + at(a, b) * kLanes;
      flush<T>(total, pair);
      for (int64_t k = i; k < n; ++k) pair[0] += static_cast<double>(L::get(x[a][k]) * L::get((kTriangle ? x : y)[b][k]));
    }
}

template <typename T, typename S, int kX, typename At>
inline void block_row(const S* const* x, const S* const* y, int count, int64_t n, double* acc, const At& at) {
  switch (count) {
    case 1: return products<T, S, kX, 1, false, 2>(x, y, n, acc, at);
    case 2: return products<T, S, kX, 2, false, 2>(x, y, n, acc, at);
    default: return products<T, S, kX, 3, false, 1>(x, y, n, acc, at);
  }
}

// K = 1, the case that has to run at the speed of memory, is one block of two rows and three products.
template <typename T, typename S>
void gram(const S* const* rows, int num_rows, int64_t n, bool row_only, double* acc) {
  if (row_only) {
    products<T, S, 1, 1, true, 4>(rows, rows, n, acc, [](int, int) { return 0; });
    for (int j = 1; j < num_rows; j += 3) {
      const int count = num_rows - j < 3 ? num_rows - j : 3;
      block_row<T, S, 1>(rows, rows + j, count, n, acc, [j](int, int b) { return j + b; });
    }
    return;
  }
  auto pair = [num_rows](int i, int j) { return i * num_rows - i * (i - 1) / 2 + j - i; };
  for (int i = 0; i < num_rows; i += 3) {
    const int height = num_rows - i < 3 ? num_rows - i : 3;
    auto diagonal = [=](int a, int b) { return pair(i + a, i + b); };
    if (height == 1) products<T, S, 1, 1, true, 4>(rows + i, rows + i, n, acc, diagonal);
    if (height == 2) products<T, S, 2, 2, true, 4>(rows + i, rows + i, n, acc, diagonal);
    if (height == 3) products<T, S, 3, 3, true, 2>(rows + i, rows + i, n, acc, diagonal);
    for (int j = i + 3; j < num_rows; j += 3) {
      const int count = num_rows - j < 3 ? num_rows - j : 3;
      block_row<T, S, 3>(rows + i, rows + j, count, n, acc, [=](int a, int b) { return pair(i + a, j + b); });
    }
  }
}

template <typename T, typename S, int kRows>
void combine_rows(S* out, const S* const* rows, const T* weights, int64_t n) {
  using L = Lane<T, S>;
  using V = typename L::V;
  int64_t i = 0;
  for (; i + 2 * L::kElements <= n; i += 2 * L::kElements) {
    V total[2][L::kVectors];
    for (int u = 0; u < 2; ++u)
      for (int r = 0; r < kRows; ++r) {
        V x[L::kVectors];
        L::load(rows[r] + i + u * L::kElements, x);
        if (kRows >= 4) prefetch(rows[r] + i + u * L::kElements + kTile);
        for (int v = 0; v < L::kVectors; ++v) total[u][v] = r ? total[u][v] + weights[r] * x[v] : weights[r] * x[v];
      }
    for (int u = 0; u < 2; ++u) L::store(out + i + u * L::kElements, total[u]);
  }
  for (; i < n; ++i) {
    T total = weights[0] * L::get(rows[0][i]);
    for (int r = 1; r < kRows; ++r) total += weights[r] * L::get(rows[r][i]);
    out[i] = L::put(total);
  }
}

template <typename T, typename S>
void combine(S* out, const S* const* rows, const T* weights, int num_rows, int64_t n) {
  switch (num_rows) {
    case 1: return combine_rows<T, S, 1>(out, rows, weights, n);
    case 2: return combine_rows<T, S, 2>(out, rows, weights, n);
    case 3: return combine_rows<T, S, 3>(out, rows, weights, n);
    case 4: return combine_rows<T, S, 4>(out, rows, weights, n);
    case 5: return combine_rows<T, S, 5>(out, rows, weights, n);
    case 6: return combine_rows<T, S, 6>(out, rows, weights, n);
    case 7: return combine_rows<T, S, 7>(out, rows, weights, n);
    case 8: return combine_rows<T, S, 8>(out, rows, weights, n);
    case 9: return combine_rows<T, S, 9>(out, rows, weights, n);
  }
  // More rows: the sum in T on the stack, because a later row may be the very memory of out.
  alignas(64) T partial[kTile];
  for (int64_t i = 0; i < n; ++i) partial[i] = T(0);
  for (int r = 0; r < num_rows; ++r)
    for (int64_t i = 0; i < n; ++i) partial[i] += weights[r] * Lane<T, S>::get(rows[r][i]);
  for (int64_t i = 0; i < n; ++i) out[i] = Lane<T, S>::put(partial[i]);
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
    const __m256i word = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(word, 1), _mm256_set1_epi16(static_cast<short>(0xbf80))));
#elif GRADPROJ_VECTOR_BYTES > 16
    const __m128i word = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 8);
    return _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(word, 1), _mm_set1_epi16(static_cast<short>(0xbf80))));
#else
    V v;
    for (int l = 0; l < Vector<float>::kWidth; ++l) v[l] = from_f8(p[l].bits);
    return v;
#endif
  }
  static inline float get(F8 x) { return from_f8(x.bits) * (1.0f / kFactor); }
};

// f(start, n, block) for the runs of elements that share a scale; without scales all are one.
template <typename S, typename F>
inline void for_each_block(int64_t start, int64_t n, const F& f) {
  if constexpr (sizeof(S) > 1) return f(start, n, int64_t{0});
  for (const int64_t end = start + n; start < end;) {
    const int64_t left = kScaleBlock - start % kScaleBlock, count = end - start < left ? end - start : left;
    f(start, count, start / kScaleBlock);
    start += count;
  }
}

template <typename S>
inline bool vectors_hold(const S* p, int64_t n) {
  if constexpr (sizeof(S) == 1)
    return !any_nan_f8(reinterpret_cast<const uint8_t*>(p), n);
  else
    return true;
}

template <typename S>
void stored_products(const float* g, const void* const* rows, const float* const* scales, int num_rows, int64_t start, int64_t n,
                     double* acc) {
  using D = Decode<S>;
  constexpr int kWidth = Vector<float>::kWidth, kUnroll = 4;
  for (int r = 0; r < num_rows; ++r) {
    double* pair = acc + r * kLanes;
    for_each_block<S>(start, n, [&](int64_t at, int64_t count, int64_t block) {
      const S* x = static_cast<const S*>(rows[r]) + at;
      const float* y = g + (at - start);
      typename D::V sums[kUnroll] = {};
      int64_t i = 0;
      if (vectors_hold(x, count))
        for (; i + kUnroll * kWidth <= count; i += kUnroll * kWidth) {
          prefetch(x + i + kTile);
          for (int u = 0; u < kUnroll; ++u)
            sums[u] += D::load(x + i + u * kWidth) * Decode<float>::load(y + i + u * kWidth);
        }
      float tail = 0.0f;
      for (; i < count; ++i) tail += D::get(x[i]) * y[i];
      const double scale = static_cast<double>(D::kFactor) * (sizeof(S) == 1 ? scales[r][block] : 1.0f);
      const typename D::V total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (int l = 0; l < kWidth; ++l) pair[l % kLanes] += static_cast<double>(total[l]) * scale;
      pair[0] += static_cast<double>(tail) * scale;
    });
  }
}

template <typename S, int kRows>
void stored_combine_rows(float* out, const float* g, float weight, const S* const* rows, const float* weights, int64_t n) {
  using D = Decode<S>;
  constexpr int kWidth = Vector<float>::kWidth;
  int64_t i = 0;
  bool vectors = true;
  for (int r = 0; r < kRows; ++r) vectors = vectors && vectors_hold(rows[r], n);
  if (vectors)
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      typename D::V total[2];
      for (int u = 0; u < 2; ++u) total[u] = weight * Decode<float>::load(g + i + u * kWidth);
      for (int r = 0; r < kRows; ++r) {
        prefetch(rows[r] + i + kTile);
        for (int u = 0; u < 2; ++u) total[u] += weights[r] * D::load(rows[r] + i + u * kWidth);
      }
      for (int u = 0; u < 2; ++u) *reinterpret_cast<Vector<float>::unaligned*>(out + i + u * kWidth) = total[u];
    }
  for (; i < n; ++i) {
    float total = weight * g[i];
    for (int r = 0; r < kRows; ++r) total += weights[r] * D::get(rows[r][i]);
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
    for (int r = 0; r < num_rows || r == 0; r += 8) {
      const int width = num_rows - r < 8 ? num_rows - r : 8;
      const S* x[8];
      float w[8];
      for (int k = 0; k < width; ++k) {
        x[k] = static_cast<const S*>(rows[r + k]) + at;
        w[k] = weights[r + k] * (Decode<S>::kFactor * (sizeof(S) == 1 ? scales[r + k][block] : 1.0f));
      }
      switch (width) {
        case 0: stored_combine_rows<S, 0>(target, source, first, x, w, count); break;
        case 1: stored_combine_rows<S, 1>(target, source, first, x, w, count); break;
        case 2: stored_combine_rows<S, 2>(target, source, first, x, w, count); break;
        case 3: stored_combine_rows<S, 3>(target, source, first, x, w, count); break;
        case 4: stored_combine_rows<S, 4>(target, source, first, x, w, count); break;
        case 5: stored_combine_rows<S, 5>(target, source, first, x, w, count); break;
        case 6: stored_combine_rows<S, 6>(target, source, first, x, w, count); break;
        case 7: stored_combine_rows<S, 7>(target, source, first, x, w, count); break;
        default: stored_combine_rows<S, 8>(target, source, first, x, w, count);
      }
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
                                      {stored_products<float>, stored_combine<float>},                 \
                                      {stored_products<BF16>, stored_combine<BF16>},                   \
                                      {stored_products<F16>, stored_combine<F16>},                     \
                                      {stored_products<F8>, stored_combine<F8>},                       \
                                      {load_tile<float>, load_blocks<float>, store_tile<float>},                           \
                                      {load_tile<double>, load_blocks<double>, store_tile<double>},                         \
                                      GRADPROJ_QUOTE(GRADPROJ_ISA)};                                   \
    return table;                                                                                      \
  }                                                                                                    \
  }

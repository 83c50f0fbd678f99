// From what a row stores to vectors of what is computed with. Part of tile_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

// bfloat16 is the upper half of a float.
inline float from_bf16(uint16_t h) { return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float f) {
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : rounded);
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

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

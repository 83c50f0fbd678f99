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

// A vector of float32 out of consecutive elements of S, and one element.
template <typename S>
struct Decode;

template <>
struct Decode<float> {
  using V = Vector<float>::type;
  static inline V load(const float* p) { return *reinterpret_cast<const Vector<float>::unaligned*>(p); }
  static inline float get(float x) { return x; }
};

template <>
struct Decode<BF16> {
  using V = Vector<float>::type;
  typedef uint16_t halves __attribute__((vector_size(GRADPROJ_VECTOR_BYTES / 2), aligned(2), may_alias));
  static inline V load(const BF16* p) {
    return reinterpret_cast<V>(__builtin_convertvector(*reinterpret_cast<const halves*>(p), Vector<uint32_t>::type) << 16);
  }
  static inline float get(BF16 x) { return from_bf16(x.bits); }
};

template <>
struct Decode<F16> {
  using V = Vector<float>::type;
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

constexpr int kGroup = 8;  // rows that walk in step: what 16 registers hold beside the gradient

// Asks for the next tile's lines of rows that walk in step, once per line.
template <int kRows, typename S>
inline void prefetch_rows(const S* const* x, int64_t i) {
  if (i % (64 / static_cast<int64_t>(sizeof(S))) == 0)
    GRADPROJ_UNROLL for (int r = 0; r < kRows; ++r) prefetch(x[r] + i + kTile);
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

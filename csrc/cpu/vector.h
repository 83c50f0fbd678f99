// Vectors, and the steps in which kernels take a row. Included by kernels_impl.h.

// For loops of constant length over arrays that are to live in registers: gcc leaves an array in memory if one such
// loop remains.
#if defined(__clang__)
#define GRADPROJ_UNROLL _Pragma("unroll")
#else
#define GRADPROJ_UNROLL _Pragma("GCC unroll 16")
#endif

template <typename T>
struct Vector {
  static constexpr int kWidth = GRADPROJ_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), may_alias));
  typedef T unaligned __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

inline float decode(float x) { return x; }
inline double decode(double x) { return x; }
// bfloat16 is the upper half of a float.
inline float decode(BF16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
// Exact: the exponent is rebased by a multiplication, which also normalises subnormals.
inline float decode(F16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * __builtin_bit_cast(float, 0x77800000u);  // 2^112
  const uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | infinite | sign);
}

// Rounds to nearest even; NaN stays NaN.
inline void encode(float x, float& out) { out = x; }
inline void encode(double x, double& out) { out = x; }
inline void encode(double x, float& out) { out = static_cast<float>(x); }
inline void encode(float x, double& out) { out = x; }
inline void encode(float x, BF16& out) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  out.bits = static_cast<uint16_t>((x != x ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
// Overflow gives infinity. Below the normal float16, adding 0.5 puts the units of a subnormal in the last bits.
inline void encode(float x, F16& out) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x), magnitude = u & 0x7fffffffu;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t rounded = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x477ff000u ? 0x7c00u : finite;
  out.bits = static_cast<uint16_t>((u >> 16 & 0x8000u) | rounded);
}

// A step is the elements of a row that one load takes, as kVectors vectors of T. kInOrder: vectors hold consecutive
// elements, as they must where rows of different dtypes meet. Rows of one dtype may come in any order that is the same
// for all of them.
template <typename T, typename S, bool kInOrder>
struct Step;

template <typename T, bool kInOrder>
struct Step<T, T, kInOrder> {
  using V = typename Vector<T>::type;
  static constexpr int kVectors = 1;
  static constexpr int kElements = Vector<T>::kWidth;
  static inline V load(const T* p, int) { return *reinterpret_cast<const typename Vector<T>::unaligned*>(p); }
  static inline void store(T* p, const V (&in)[1]) { *reinterpret_cast<typename Vector<T>::unaligned*>(p) = in[0]; }
};

// Even elements, then odd ones: widening is one shift or one mask on a whole vector.
template <>
struct Step<float, BF16, false> {
  using V = Vector<float>::type;
  using U = Vector<uint32_t>::type;
  typedef uint32_t pairs __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), aligned(2), may_alias));
  static constexpr int kVectors = 2;
  static constexpr int kElements = 2 * Vector<float>::kWidth;
  static inline V load(const BF16* p, int v) {
    const U raw = *reinterpret_cast<const pairs*>(p);
    return reinterpret_cast<V>(v == 0 ? raw << 16 : raw & 0xffff0000u);
  }
  // What encode(float, BF16&) computes, left in the upper half of each word.
  static inline U rounded(V x) {
    const U u = reinterpret_cast<U>(x);
    return x != x ? u | 0x400000u : u + 0x7fffu + (u >> 16 & 1u);
  }
  static inline void store(BF16* p, const V (&in)[2]) {
    *reinterpret_cast<pairs*>(p) = rounded(in[0]) >> 16 | (rounded(in[1]) & 0xffff0000u);
  }
};

typedef uint16_t halves __attribute__((vector_size(GRADPROJ_VECTOR_BYTES / 2), aligned(2), may_alias));

template <>
struct Step<float, BF16, true> : Step<float, float, true> {
  static inline V load(const BF16* p, int) {
    const auto bits = __builtin_convertvector(*reinterpret_cast<const halves*>(p), Vector<uint32_t>::type);
    return reinterpret_cast<V>(bits << 16);
  }
};

template <>
struct Step<float, F16, true> : Step<float, float, true> {
  static inline V load(const F16* p, int) {
#if GRADPROJ_VECTOR_BYTES == 64
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif GRADPROJ_VECTOR_BYTES == 32
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V out;
    for (int l = 0; l < kElements; ++l) out[l] = decode(p[l]);
    return out;
#endif
  }
};

// Adds lane l of a vector to lane l modulo kLanes of a sum: the order depends on the vector's width alone.
template <typename T>
inline void widen(typename Vector<T>::type v, PairSum& sum) {
#if GRADPROJ_VECTOR_BYTES == 64  // of __builtin_convertvector gcc makes twice as many instructions
  if constexpr (sizeof(T) == sizeof(float)) {
    const __m512 x = reinterpret_cast<__m512>(v);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    *reinterpret_cast<__m512d*>(sum.lanes) = *reinterpret_cast<const __m512d*>(sum.lanes) + low + high;
    return;
  }
#endif
  constexpr int kWidth = Vector<double>::kWidth;
  typedef T part __attribute__((vector_size(kWidth * sizeof(T)), may_alias));
  GRADPROJ_UNROLL for (int l = 0; l < Vector<T>::kWidth; l += kWidth)
    *reinterpret_cast<Vector<double>::type*>(sum.lanes + l % kLanes) +=
        __builtin_convertvector(reinterpret_cast<const part*>(&v)[l / kWidth], Vector<double>::type);
}

// Asks for the line 1024 elements ahead of p. With more than three rows a tile of each is about a page, and the
// processor's own prefetchers start anew on every page. Past the end of a buffer a prefetch does nothing.
template <typename S>
inline void prefetch(const S* p) {
  __builtin_prefetch(p + 1024, 0, 2);
}

// Calls f with n, 1 to kMost, as a compile-time count.
template <int kMost, typename F>
inline void with_count(int n, const F& f) {
  if constexpr (kMost > 1)
    if (n < kMost) return with_count<kMost - 1>(n, f);
  f(std::integral_constant<int, kMost>{});
}

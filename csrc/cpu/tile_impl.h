// Included by tile_portable.cpp, tile_avx2.cpp and tile_avx512.cpp, each under its own target and with its own
// GRADPROJ_ISA and GRADPROJ_VECTOR_BYTES. Vectors are the compiler's vector extension, so one source serves every processor.
// No header that defines inline functions may be included from here: the linker would keep one instruction set's copy for all.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

template <typename T>
struct Vector {
  static constexpr int kWidth = GRADPROJ_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(GRADPROJ_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <typename T>
inline typename Vector<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}

template <typename T>
inline void store(T* p, typename Vector<T>::type v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v;
}

// Folds a vector's lanes into kLanes float64 sums: lane l goes to l modulo kLanes, so the order depends on the vector's
// width alone.
template <typename T>
inline void flush(typename Vector<T>::type v, double* acc) {
  constexpr int width = Vector<T>::kWidth;
  for (int l = 0; l < width; ++l) acc[l % kLanes] += static_cast<double>(v[l]);
}

// Products of row x with kOthers rows from `others`, added to acc (kLanes doubles per row). kUnroll independent sums per row
// hide the latency of the multiply-add.
template <typename T, int kOthers, int kUnroll>
inline void dots(const T* x, const T* const* others, int64_t n, double* acc) {
  using V = typename Vector<T>::type;
  constexpr int width = Vector<T>::kWidth;
  V sums[kOthers][kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * width <= n; i += kUnroll * width)
    for (int u = 0; u < kUnroll; ++u) {
      const V a = load(x + i + u * width);
      for (int o = 0; o < kOthers; ++o) sums[o][u] += a * load(others[o] + i + u * width);
    }
  for (int o = 0; o < kOthers; ++o) {
    V total = sums[o][0];
    for (int u = 1; u < kUnroll; ++u) total += sums[o][u];
    flush<T>(total, acc + o * kLanes);
  }
  for (; i < n; ++i)
    for (int o = 0; o < kOthers; ++o) acc[o * kLanes] += static_cast<double>(x[i] * others[o][i]);
}

// Two rows, three products, each element read once: K = 1, the case that has to run at the speed of memory.
template <typename T>
inline void dots_of_two(const T* x, const T* y, int64_t n, double* acc) {
  using V = typename Vector<T>::type;
  constexpr int width = Vector<T>::kWidth;
  constexpr int unroll = 4;
  V xx[unroll] = {}, xy[unroll] = {}, yy[unroll] = {};
  int64_t i = 0;
  for (; i + unroll * width <= n; i += unroll * width)
    for (int u = 0; u < unroll; ++u) {
      const V a = load(x + i + u * width), b = load(y + i + u * width);
      xx[u] += a * a;
      xy[u] += a * b;
      yy[u] += b * b;
    }
  flush<T>((xx[0] + xx[1]) + (xx[2] + xx[3]), acc);
  flush<T>((xy[0] + xy[1]) + (xy[2] + xy[3]), acc + kLanes);
  flush<T>((yy[0] + yy[1]) + (yy[2] + yy[3]), acc + 2 * kLanes);
  for (; i < n; ++i) {
    acc[0] += static_cast<double>(x[i] * x[i]);
    acc[kLanes] += static_cast<double>(x[i] * y[i]);
    acc[2 * kLanes] += static_cast<double>(y[i] * y[i]);
  }
}

template <typename T>
void gram(const T* const* rows, int num_rows, int64_t n, bool row_only, double* acc) {
  if (num_rows == 2 && !row_only) return dots_of_two(rows[0], rows[1], n, acc);
  for (int i = 0; i < (row_only ? 1 : num_rows); ++i) {
    int j = i;
    for (; j + 4 <= num_rows; j += 4, acc += 4 * kLanes) dots<T, 4, 2>(rows[i], rows + j, n, acc);
    for (; j < num_rows; ++j, acc += kLanes) dots<T, 1, 4>(rows[i], rows + j, n, acc);
  }
}

template <typename T, int kRows>
void combine_rows(T* out, const T* const* rows, const T* weights, int64_t n) {
  using V = typename Vector<T>::type;
  constexpr int width = Vector<T>::kWidth;
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    V low = weights[0] * load(rows[0] + i), high = weights[0] * load(rows[0] + i + width);
    for (int r = 1; r < kRows; ++r) {
      low += weights[r] * load(rows[r] + i);
      high += weights[r] * load(rows[r] + i + width);
    }
    store(out + i, low);
    store(out + i + width, high);
  }
  for (; i < n; ++i) {
    T total = weights[0] * rows[0][i];
    for (int r = 1; r < kRows; ++r) total += weights[r] * rows[r][i];
    out[i] = total;
  }
}

template <typename T>
void combine(T* out, const T* const* rows, const T* weights, int num_rows, int64_t n) {
  switch (num_rows) {
    case 1: return combine_rows<T, 1>(out, rows, weights, n);
    case 2: return combine_rows<T, 2>(out, rows, weights, n);
    case 3: return combine_rows<T, 3>(out, rows, weights, n);
    case 4: return combine_rows<T, 4>(out, rows, weights, n);
    case 5: return combine_rows<T, 5>(out, rows, weights, n);
    case 6: return combine_rows<T, 6>(out, rows, weights, n);
    case 7: return combine_rows<T, 7>(out, rows, weights, n);
    case 8: return combine_rows<T, 8>(out, rows, weights, n);
    case 9: return combine_rows<T, 9>(out, rows, weights, n);
  }
  // More rows: nine at a time into a tile on the stack, because a later row may be the very memory of out.
  alignas(64) T partial[kTile];
  combine_rows<T, 9>(partial, rows, weights, n);
  for (int r = 9; r < num_rows; r += 8) {
    const int take = num_rows - r < 8 ? num_rows - r : 8;
    const T* group[9] = {partial};
    T scale[9] = {T(1)};
    for (int k = 0; k < take; ++k) {
      group[1 + k] = rows[r + k];
      scale[1 + k] = weights[r + k];
    }
    combine<T>(r + take == num_rows ? out : partial, group, scale, 1 + take, n);
  }
}

// bfloat16 is the upper half of a float.
inline float from_bf16(uint16_t h) { return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float f) {
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : rounded);
}

#if !defined(__F16C__)
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

template <typename T, typename S>
inline void convert(const char* source, T* out, int64_t n) {
  const S* s = reinterpret_cast<const S*>(source);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(s[i]);
}

template <typename T>
void load_f16(const uint16_t* s, T* out, int64_t n) {
#if defined(__F16C__)
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
    for (int l = 0; l < 8; ++l) out[i + l] = static_cast<T>(wide[l]);
  }
  for (; i < n; ++i) out[i] = static_cast<T>(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(s[i]))));
#else
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_f16(s[i]));
#endif
}

template <typename T>
void store_f16(const T* s, uint16_t* out, int64_t n) {
#if defined(__F16C__)
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

template <typename T>
void load_tile(const char* source, DType dtype, T* out, int64_t n) {
  switch (dtype) {
    case DType::f32: return convert<T, float>(source, out, n);
    case DType::f64: return convert<T, double>(source, out, n);
    case DType::f16: return load_f16<T>(reinterpret_cast<const uint16_t*>(source), out, n);
    case DType::bf16: {
      const uint16_t* s = reinterpret_cast<const uint16_t*>(source);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_bf16(s[i]));
    }
  }
}

template <typename T>
void store_tile(const T* source, char* out, DType dtype, int64_t n) {
  switch (dtype) {
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
    static constexpr Kernels table = {{gram<float>, combine<float>, load_tile<float>, store_tile<float>}, \
                                      {gram<double>, combine<double>, load_tile<double>, store_tile<double>}, \
                                      GRADPROJ_QUOTE(GRADPROJ_ISA)};                                   \
    return table;                                                                                      \
  }                                                                                                    \
  }

// Whole tiles between a dtype's storage and what is computed with. Part of tile_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

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

template <typename T>
void load_tile(const char* source, DType dtype, T* out, int64_t n) {
  switch (dtype) {
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

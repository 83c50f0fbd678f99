// Tiles between what a row stores and what is computed with. Part of kernels_impl.h.

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

template <typename S, typename T>
void load_from(const char* source, T* out, int64_t n) {
  const S* s = reinterpret_cast<const S*>(source);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(decode(s[i]));
}

template <typename T>
void load(const char* source, DType dtype, T* out, int64_t n) {
  switch (dtype) {
    case DType::f32: return load_from<float>(source, out, n);
    case DType::f64: return load_from<double>(source, out, n);
    case DType::f16: return load_from<F16>(source, out, n);
    case DType::bf16: return load_from<BF16>(source, out, n);
  }
}

// float64 reaches the 16-bit types through float32.
template <typename S, typename T>
void store_to(const T* source, char* out, int64_t n) {
  S* s = reinterpret_cast<S*>(out);
  for (int64_t i = 0; i < n; ++i) encode(source[i], s[i]);
}

template <typename T>
void store(const T* source, char* out, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::f32: return store_to<float>(source, out, n);
    case DType::f64: return store_to<double>(source, out, n);
    case DType::f16: return store_to<F16>(source, out, n);
    case DType::bf16: return store_to<BF16>(source, out, n);
  }
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

// Tiles between what a row stores and what is computed with. Included by kernels_impl.h.

// Calls f with a zero of the type that a row of this dtype stores.
template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(F16{});
    case DType::bf16: return f(BF16{});
  }
}

template <typename T>
void load(const char* source, DType dtype, T* out, int64_t n) {
  with_type(dtype, [&]<typename S>(S) {
    const S* s = reinterpret_cast<const S*>(source);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(decode(s[i]));
  });
}

// float64 reaches the 16-bit types through float32.
template <typename T>
void store(const T* source, char* out, DType dtype, int64_t n) {
  with_type(dtype, [&]<typename S>(S) {
    S* s = reinterpret_cast<S*>(out);
    for (int64_t i = 0; i < n; ++i) encode(source[i], s[i]);
  });
}

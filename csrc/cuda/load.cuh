// Elements between memory and registers. Storage type S is what lies in memory, C (float or double) what is computed with.
#pragma once

#include "params.h"

namespace gradproj::cuda {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

template <typename C>
__device__ inline C widen(float x) { return x; }
template <typename C>
__device__ inline C widen(double x) { return static_cast<C>(x); }
template <typename C>
__device__ inline C widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <typename C>
__device__ inline C widen(BF16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <typename C>
__device__ inline void narrow(C x, float& out) { out = static_cast<float>(x); }
template <typename C>
__device__ inline void narrow(C x, double& out) { out = x; }
template <typename C>
__device__ inline void narrow(C x, F16& out) { out.bits = __half_as_ushort(__float2half_rn(static_cast<float>(x))); }
template <typename C>
__device__ inline void narrow(C x, BF16& out) {  // round to nearest even; NaN stays NaN
  const uint32_t u = __float_as_uint(static_cast<float>(x));
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : rounded);
}

// kCount elements in one access of up to 16 bytes, or several of 16.
template <typename S, int kCount>
struct alignas(sizeof(S) * kCount < 16 ? sizeof(S) * kCount : 16) Pack {
  S x[kCount];
};

// How a kernel instance reads its rows.
// Uniform<S>: every row stores S; a lane takes 16 bytes of each row at a time (8 in ForManyRows of a 2-byte type: eight
// elements of nine rows, widened, do not fit the registers).
template <typename S, int kElements = 16 / static_cast<int>(sizeof(S))>
struct Uniform {
  static constexpr int kCount = kElements;
  static constexpr bool kMixed = false;
  using ForManyRows = Uniform<S, (kElements < 4 ? kElements : 4)>;
  using Raw = Pack<S, kCount>;
  template <typename C>
  __device__ static C get(const Raw& raw, int e, int) { return widen<C>(raw.x[e]); }
  __device__ static bool aligned(const char* address, int) { return reinterpret_cast<uintptr_t>(address) % sizeof(Raw) == 0; }
  __device__ static int element_bytes(int) { return static_cast<int>(sizeof(S)); }
  __device__ static Raw load(const char* address, int) { return *reinterpret_cast<const Raw*>(address); }
  // Elements first..last only, one at a time: a segment's head or tail, or a row that is not aligned as row 0 is.
  __device__ static Raw load_some(const char* address, int, int first, int last) {
    Raw raw{};
    const S* p = reinterpret_cast<const S*>(address);
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e >= first && e < last) raw.x[e] = p[e];
    return raw;
  }
  template <typename C>
  __device__ static void store(char* address, const C* values, int, int first, int last) {
    Raw raw;
#pragma unroll
    for (int e = 0; e < kCount; ++e) narrow(values[e], raw.x[e]);
    if (first == 0 && last == kCount) {
      *reinterpret_cast<Raw*>(address) = raw;
    } else {
      S* p = reinterpret_cast<S*>(address);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        if (e >= first && e < last) p[e] = raw.x[e];
    }
  }
};

template <typename C>
__device__ inline C load_one(const char* address, int64_t index, int dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32: return widen<C>(reinterpret_cast<const float*>(address)[index]);
    case DType::f64: return widen<C>(reinterpret_cast<const double*>(address)[index]);
    case DType::f16: return widen<C>(reinterpret_cast<const F16*>(address)[index]);
    default: return widen<C>(reinterpret_cast<const BF16*>(address)[index]);
  }
}

template <typename C>
__device__ inline void store_one(char* address, int64_t index, int dtype, C value) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32: return narrow(value, reinterpret_cast<float*>(address)[index]);
    case DType::f64: return narrow(value, reinterpret_cast<double*>(address)[index]);
    case DType::f16: return narrow(value, reinterpret_cast<F16*>(address)[index]);
    default: return narrow(value, reinterpret_cast<BF16*>(address)[index]);
  }
}

__device__ inline int bytes_of(int dtype) {
  return dtype == static_cast<int>(DType::f64) ? 8 : dtype == static_cast<int>(DType::f32) ? 4 : 2;
}

// Mixed<C>: rows store different types; a lane takes 16 bytes worth of C of each row at a time, in accesses of 4 to 16 bytes.
template <typename C>
struct Mixed {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(C));
  static constexpr bool kMixed = true;
  using ForManyRows = Mixed<C>;
  struct Raw {
    C x[kCount];
  };
  template <typename>
  __device__ static C get(const Raw& raw, int e, int) { return raw.x[e]; }
  __device__ static bool aligned(const char* address, int dtype) {
    const int access = bytes_of(dtype) * kCount < 16 ? bytes_of(dtype) * kCount : 16;
    return reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(access) == 0;
  }
  __device__ static int element_bytes(int dtype) { return bytes_of(dtype); }
  template <typename S>
  __device__ static Raw load_as(const char* address) {
    const Pack<S, kCount> pack = *reinterpret_cast<const Pack<S, kCount>*>(address);
    Raw raw;
#pragma unroll
    for (int e = 0; e < kCount; ++e) raw.x[e] = widen<C>(pack.x[e]);
    return raw;
  }
  __device__ static Raw load(const char* address, int dtype) {
    switch (static_cast<DType>(dtype)) {
      case DType::f32: return load_as<float>(address);
      case DType::f64: return load_as<double>(address);
      case DType::f16: return load_as<F16>(address);
      default: return load_as<BF16>(address);
    }
  }
  __device__ static Raw load_some(const char* address, int dtype, int first, int last) {
    Raw raw{};
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e >= first && e < last) raw.x[e] = load_one<C>(address, e, dtype);
    return raw;
  }
  template <typename>
  __device__ static void store(char* address, const C* values, int dtype, int first, int last) {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e >= first && e < last) store_one(address, e, dtype, values[e]);
  }
};

// A warp's share of a segment: elements [begin, end) counted from the padded start, begin a multiple of kGranule. Element
// i of row r lies at base[r] + i * bytes; those below pad or from numel on do not exist.
struct Run {
  int segment;
  int64_t begin, end;
  int64_t pad, total;  // total: pad + numel
};

// Calls f(run) for every segment that granules [first, last) touch. All lanes of a warp take the same way.
template <typename P, typename F>
__device__ inline void for_each_run(const P& p, int row0_bytes, uint32_t first, uint32_t last, const F& f) {
  int low = 0, high = p.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.end(middle) > first)
      high = middle;
    else
      low = middle + 1;
  }
  for (int s = low; s < p.count && first < last; ++s) {
    const uint32_t packed = p.packed(s), begin = p.begin(s), end = packed >> 6;
    const uint32_t stop = end < last ? end : last;
    Run run;
    run.segment = s;
    run.pad = front_pad(p.address(s, 0), row0_bytes);
    run.total = int64_t{end - begin - 1} * kGranule + (packed & 63u) + 1;
    run.begin = int64_t{first - begin} * kGranule;
    run.end = int64_t{stop - begin} * kGranule;
    if (run.end > run.total) run.end = run.total;
    f(run);
    first = stop;
  }
}

// Coordinates of a linear index of a strided piece, below 2^52: a product with the inverse is off by one at most.
struct Coordinates {
  int64_t at[kMaxDims];

  __device__ Coordinates(const StridedPiece& p, int64_t i) {
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      at[d] = 0;
      if (d >= p.ndim) continue;
      int64_t quotient = static_cast<int64_t>(static_cast<double>(i) * p.inverse[d]);
      int64_t rest = i - quotient * p.sizes[d];
      if (rest < 0) {
        --quotient;
        rest += p.sizes[d];
      }
      if (rest >= p.sizes[d]) {
        ++quotient;
        rest -= p.sizes[d];
      }
      at[d] = rest;
      i = quotient;
    }
  }
  // In elements, of row r.
  __device__ int64_t offset(const StridedPiece& p, int r) const {
    int64_t sum = 0;
#pragma unroll
    for (int d = 0; d < kMaxDims; ++d)
      if (d < p.ndim) sum += at[d] * p.strides[r][d];
    return sum;
  }
};

}  // namespace gradproj::cuda

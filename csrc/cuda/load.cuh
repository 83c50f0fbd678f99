// Elements between memory and registers. Storage type S is what lies in memory, C (float or double) what is computed with.
#pragma once

#include <cstring>
#include <type_traits>

#include "params.h"

namespace gradproj::cuda {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
struct F8 {
  uint8_t bits;
};

template <typename C>
__device__ inline C widen(float x) { return x; }
template <typename C>
__device__ inline C widen(double x) { return static_cast<C>(x); }
template <typename C>
__device__ inline C widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <typename C>
__device__ inline C widen(BF16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
// e4m3fn: a multiplication by 2^120 rebases the exponent and normalises subnormals; there is no infinity and one NaN.
template <typename C>
__device__ inline C widen(F8 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fu) << 20;
  const uint32_t value = __float_as_uint(__uint_as_float(magnitude) * __uint_as_float(0x7b800000u));
  return __uint_as_float((magnitude == 0x07f00000u ? 0x7fc00000u : value) | static_cast<uint32_t>(x.bits & 0x80u) << 24);
}

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
  __device__ S get(int e) const { return x[e]; }
  __device__ void set(int e, S value) { x[e] = value; }
};
// Elements below 4 bytes share registers: each in one of its own, heads and tails would spill.
template <typename S, int kCount>
  requires(sizeof(S) < 4)
struct alignas(sizeof(S) * kCount) Pack<S, kCount> {
  static constexpr int kBytes = static_cast<int>(sizeof(S)) * kCount;
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, std::conditional_t<kBytes % 2 == 0, uint16_t, uint8_t>>;
  static constexpr int kPerWord = sizeof(Word) / sizeof(S), kBits = 8 * sizeof(S);
  Word x[kCount / kPerWord];
  __device__ S get(int e) const { return {static_cast<decltype(S::bits)>(x[e / kPerWord] >> e % kPerWord * kBits)}; }
  __device__ void set(int e, S value) {  // over zeros
    x[e / kPerWord] = static_cast<Word>(x[e / kPerWord] | static_cast<Word>(value.bits) << e % kPerWord * kBits);
  }
};

// How a kernel instance reads its rows. Raw is what a lane has of one row, as it lies in memory: loads do not wait for one
// another to be widened.
// Uniform<S>: every row stores S; a lane takes 16 bytes of each row at a time. ForRow and ForPairs are for nine rows, one
// against the others and all against all, where that many elements, widened, may not fit the registers.
template <typename S, int kElements = 16 / static_cast<int>(sizeof(S))>
struct Uniform {
  static constexpr int kCount = kElements;
  static constexpr bool kMixed = false;
  using ForRow = Uniform<S, (kElements < 4 ? kElements : 4)>;
  using ForPairs = ForRow;
  using Raw = Pack<S, kCount>;
  template <typename C>
  __device__ static C value(const Raw& raw, int e) { return widen<C>(raw.get(e)); }
  template <typename C>
  __device__ static void values(const Raw& raw, int, C (&out)[kCount]) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) out[e] = value<C>(raw, e);
  }
  __device__ static bool aligned(const char* address, int) { return reinterpret_cast<uintptr_t>(address) % sizeof(Raw) == 0; }
  __device__ static int element_bytes(int) { return static_cast<int>(sizeof(S)); }
  __device__ static Raw load(const char* address, int) { return *reinterpret_cast<const Raw*>(address); }
  // Elements first..last only, one at a time: a segment's head or tail, or a row that is not aligned as row 0 is.
  __device__ static Raw load_some(const char* address, int, int first, int last) {
    Raw raw{};
    const S* p = reinterpret_cast<const S*>(address);
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e >= first && e < last) raw.set(e, p[e]);
    return raw;
  }
  template <typename C>
  __device__ static void store(char* address, const C* values, int, int first, int last) {
    S narrowed[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) narrow(values[e], narrowed[e]);
    if (first == 0 && last == kCount) {
      Raw raw{};
#pragma unroll
      for (int e = 0; e < kCount; ++e) raw.set(e, narrowed[e]);
      *reinterpret_cast<Raw*>(address) = raw;
    } else {
      S* p = reinterpret_cast<S*>(address);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        if (e >= first && e < last) p[e] = narrowed[e];
    }
  }
};

__device__ inline int bytes_of(int dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::f8: return 1;
    default: return 2;
  }
}

// Mixed<C>: rows store different types, and may be float8; a lane takes as many elements of each row at a time as 16 bytes of
// C hold, in accesses of 2 to 16 bytes.
template <typename C, int kElements = 16 / static_cast<int>(sizeof(C))>
struct Mixed {
  static constexpr int kCount = kElements;
  static constexpr bool kMixed = true;
  using ForRow = Mixed<C>;
  using ForPairs = Mixed<C, kElements / 2>;
  struct Raw {
    uint32_t bits[sizeof(C) * kCount / 4];
  };
  template <typename S>
  using As = Uniform<S, kCount>;
  template <typename S>
  __device__ static Raw raw_of(const Pack<S, kCount>& pack) {
    static_assert(sizeof(pack) <= sizeof(Raw));
    Raw raw{};
    memcpy(&raw, &pack, sizeof(pack));
    return raw;
  }
  // f(S{}) for the type that dtype stores; only its size counts with kBySize. float64 is in no row where C is float.
  template <bool kBySize, typename F>
  __device__ static auto dispatch(int dtype, const F& f) {
    switch (static_cast<DType>(dtype)) {
      case DType::f64:
        if constexpr (sizeof(C) == 8) return f(double{});
        [[fallthrough]];
      case DType::f32: return f(float{});
      case DType::f8: return f(F8{});
      case DType::f16: return f(F16{});
      default: return f(std::conditional_t<kBySize, F16, BF16>{});
    }
  }
  template <typename>
  __device__ static void values(const Raw& raw, int dtype, C (&out)[kCount]) {
    dispatch<false>(dtype, [&](auto type) {
      Pack<decltype(type), kCount> pack;
      memcpy(&pack, &raw, sizeof(pack));
      As<decltype(type)>::values(pack, dtype, out);
    });
  }
  __device__ static bool aligned(const char* address, int dtype) {
    return reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes_of(dtype) * kCount) == 0;
  }
  __device__ static int element_bytes(int dtype) { return bytes_of(dtype); }
  __device__ static Raw load(const char* address, int dtype) {
    return dispatch<true>(dtype, [&](auto type) { return raw_of(As<decltype(type)>::load(address, dtype)); });
  }
  __device__ static Raw load_some(const char* address, int dtype, int first, int last) {
    return dispatch<true>(dtype, [&](auto type) { return raw_of(As<decltype(type)>::load_some(address, dtype, first, last)); });
  }
  template <typename>
  __device__ static void store(char* address, const C* values, int dtype, int first, int last) {
    dispatch<false>(dtype, [&](auto type) {
      if constexpr (sizeof(type) > 1) As<decltype(type)>::store(address, values, dtype, first, last);  // f8 is not written
    });
  }
};

// A warp's share of a segment: elements [pad, end), at most a chunk of them. Element i of a row lies at its address
// + (start + i) * bytes.
struct Run {
  int segment;
  int pad, end;
  int64_t start;  // negative in front of the segment's first element
};

// Calls f(run) for every segment that granules [first, last) touch. All lanes of a warp take the same way.
template <typename P, typename F>
__device__ inline void for_each_run(const P& p, int row0_bytes, uint32_t first, uint32_t last, const F& f) {
  for (int s = p.first_at(first); s < p.count && first < last; ++s) {
    const uint32_t packed = p.packed(s), begin = p.begin(s), end = packed >> 6;
    const uint32_t stop = end < last ? end : last;
    const int pad = front_pad(p.address(s, 0), row0_bytes);
    Run run;
    run.segment = s;
    run.start = int64_t{first - begin} * kGranule - pad;
    run.pad = first == begin ? pad : 0;
    run.end = static_cast<int>(stop - first) * kGranule;
    if (stop == end) run.end -= kGranule - 1 - static_cast<int>(packed & 63u);
    f(run);
    first = stop;
  }
}

// The rows of a run, kCount elements of one at a time.
template <typename C, typename Access, typename P>
class RunRows {
 public:
  static constexpr int kCount = Access::kCount;
  // Without scales a row is its Raw.
  struct Scaled {
    typename Access::Raw raw;
    float low, high;  // of the first element's block, and of the next
  };
  using Part = std::conditional_t<Access::kMixed, Scaled, typename Access::Raw>;

  __device__ RunRows(const P& p, const Run& run) : p_(p), run_(run) {}
  __device__ int dtype(int r) const { return p_.info.dtype[r]; }
  __device__ char* at(int r, int i) const {
    const int bytes = Access::element_bytes(dtype(r));
    return const_cast<char*>(p_.address(run_.segment, r)) + run_.start * bytes + i * bytes;
  }
  __device__ bool aligned(int r) const { return Access::aligned(at(r, 0), dtype(r)); }
  __device__ Part load(int r, int i) const { return with_scales(r, i, 0, kCount, Access::load(at(r, i), dtype(r))); }
  // Elements from..to only, in any alignment.
  __device__ Part load_some(int r, int i, int from, int to) const {
    return with_scales(r, i, from, to,
                       from == 0 && to == kCount && aligned(r) ? Access::load(at(r, i), dtype(r))
                                                               : Access::load_some(at(r, i), dtype(r), from, to));
  }
  __device__ void values(int r, int i, const Part& part, C (&out)[kCount]) const {
    if constexpr (Access::kMixed) {
      Access::template values<C>(part.raw, dtype(r), out);
      const int within = (static_cast<int>(run_.start) + i) & static_cast<int>(kScaleBlock - 1);
      if (p_.info.scale[r])
#pragma unroll
        for (int e = 0; e < kCount; ++e) out[e] *= static_cast<C>(within + e < kScaleBlock ? part.low : part.high);
    } else {
      Access::values(part, dtype(r), out);
    }
  }

 private:
  __device__ Part with_scales(int r, int i, int from, int to, const typename Access::Raw& raw) const {
    if constexpr (Access::kMixed) {
      Part part{raw, 0.0f, 0.0f};
      if (p_.info.scale[r] && from < to) {
        const float* scale = reinterpret_cast<const float*>(p_.address(run_.segment, p_.info.scale[r]));
        const int64_t first = run_.start + i, last = first + to - 1;
        part.low = scale[first > 0 ? first / kScaleBlock : 0];
        part.high = scale[last / kScaleBlock];
      }
      return part;
    } else {
      return raw;
    }
  }

  const P& p_;
  const Run& run_;
};

template <typename C>
__device__ inline C load_one(const char* address, int64_t index, int dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32: return widen<C>(reinterpret_cast<const float*>(address)[index]);
    case DType::f64: return widen<C>(reinterpret_cast<const double*>(address)[index]);
    case DType::f16: return widen<C>(reinterpret_cast<const F16*>(address)[index]);
    case DType::f8: return widen<C>(reinterpret_cast<const F8*>(address)[index]);
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

// One element of every row of a strided piece. Its linear index is below 2^52: a product with the inverse is off by one at most.
template <typename C, typename P>
class Element {
 public:
  __device__ Element(const P& p, int64_t i) : p_(p) {
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      at_[d] = 0;
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
      at_[d] = rest;
      i = quotient;
    }
  }
  __device__ C load(int r) const {
    const int64_t i = offset(r);
    const C x = load_one<C>(p_.address[r], i, p_.info.dtype[r]);
    return p_.scale[r] ? x * static_cast<C>(p_.scale[r][i / kScaleBlock]) : x;
  }
  // What row r stands for: row 0 may be counted from a base.
  __device__ C value(int r) const { return r == 0 && p_.base ? load(p_.base) - load(0) : load(r); }
  __device__ void store(C value) const { store_one(const_cast<char*>(p_.address[0]), offset(0), p_.info.dtype[0], value); }

 private:
  __device__ int64_t offset(int r) const {  // in elements
    int64_t sum = 0;
#pragma unroll
    for (int d = 0; d < kMaxDims; ++d)
      if (d < p_.ndim) sum += at_[d] * p_.strides[r][d];
    return sum;
  }

  const P& p_;
  int64_t at_[kMaxDims];
};

}  // namespace gradproj::cuda

// Elements between memory and registers. G is what row 0 stores, D what the other rows store; they are computed with as
// float, or as double where G is double. Elements travel in pairs, for which CUDA has types and packed conversions.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace gradproj::cuda {

template <typename G>
using Compute = std::conditional_t<std::is_same_v<G, double>, double, float>;

float2 pair_of(float);  // declared for the types alone
double2 pair_of(double);
__half2 pair_of(__half);
__nv_bfloat162 pair_of(__nv_bfloat16);

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float2 widen(float2 x) { return x; }
__device__ inline double2 widen(double2 x) { return x; }
__device__ inline float2 widen(__half2 x) { return __half22float2(x); }
__device__ inline float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }

// One rounding each: from double to 16 bits not by way of float.
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(double x, float& out) { out = static_cast<float>(x); }
__device__ inline void narrow(double x, __half& out) { out = __double2half(x); }
__device__ inline void narrow(double x, __nv_bfloat16& out) { out = __double2bfloat16(x); }
__device__ inline void narrow(float2 x, float2& out) { out = x; }
__device__ inline void narrow(double2 x, double2& out) { out = x; }
__device__ inline void narrow(float2 x, __half2& out) { out = __float22half2_rn(x); }
__device__ inline void narrow(float2 x, __nv_bfloat162& out) { out = __float22bfloat162_rn(x); }

// kCount elements of up to 16 bytes together, moved by one instruction.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  using Pair = decltype(pair_of(T{}));
  uint32_t word[sizeof(T) * kCount / 4];

  __device__ Pair pair(int e) const {
    Pair x;
    memcpy(&x, word + e * (sizeof(Pair) / 4), sizeof(Pair));
    return x;
  }
  __device__ void set_pair(int e, Pair x) { memcpy(word + e * (sizeof(Pair) / 4), &x, sizeof(Pair)); }
};

template <int kCount, typename T>
__device__ inline bool aligned(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % (kCount * sizeof(T)) == 0;
}
template <int kCount, typename T>
__device__ inline Pack<T, kCount> load(const T* row) {
  return *reinterpret_cast<const Pack<T, kCount>*>(row);
}
template <int kCount, typename T>
__device__ inline void store(T* row, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(row) = pack;
}

}  // namespace gradproj::cuda

// The arithmetic of both operations on runs of elements, every row of which is contiguous. A run is as long as it gets (rows
// read in place) or a tile (rows that went through a buffer); what has to be read twice is taken by the tile, from L1, in here.
// Compiled once per instruction set; see tile_impl.h.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace gradproj::cpu {

constexpr int kTile = 1024;  // elements: R rows of float32 fit L1 for K = 1..7
constexpr int kLanes = 8;    // float64 partial sums per pair of rows, added up once per task

// Rows of storage type S, computed in T.
template <typename T, typename S>
struct RowKernels {
  // Adds the products of rows i <= j (only i = 0 if row_only) to acc, kLanes doubles per pair, pairs in row-major order of
  // the upper triangle. Reads R n elements. Sums of float products are widened after 48 to a lane.
  void (*gram)(const S* const* rows, int num_rows, int64_t n, bool row_only, double* acc);
  // out = sum_r weights[r] rows[r], rounded once; out may be one of the rows. Reads R n elements, writes n.
  void (*combine)(S* out, const S* const* rows, const T* weights, int num_rows, int64_t n);
};

// Between a dtype's storage and T; contiguous.
template <typename T>
struct Converters {
  void (*load)(const char* source, DType dtype, T* out, int64_t n);
  void (*store)(const T* source, char* out, DType dtype, int64_t n);
};

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// A float32 gradient with directions of one 16-bit type, decoded in registers: nothing but what is stored is moved. Elements
// `start` to `start` + n of the directions, whose pointers are those of element 0; g is that of `start`.
struct MixedKernels {
  // acc += <g, g>, then acc + (1 + r) * kLanes += <g, rows[r]>.
  void (*products)(const float* g, const void* const* rows, int num_rows, int64_t start, int64_t n, double* acc);
  // out = weight g + sum_r weights[r] rows[r]; out may be g.
  void (*combine)(float* out, const float* g, float weight, const void* const* rows, const float* weights, int num_rows,
                  int64_t start, int64_t n);
};

struct Kernels {
  RowKernels<float, float> f32;
  RowKernels<double, double> f64;
  RowKernels<float, BF16> bf16;  // straight from memory: half the bytes are only worth something if nothing else is moved
  MixedKernels f32_with_bf16, f32_with_f16;
  Converters<float> to_f32;
  Converters<double> to_f64;
  const char* name;
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The best that this processor runs. GRADPROJ_CPU=portable|avx2|avx512 asks for another.
const Kernels& kernels();

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : sizeof(T) == 4 ? DType::f32 : DType::bf16;
}
template <typename T, typename S>
const RowKernels<T, S>& row_kernels() {
  if constexpr (sizeof(S) == 8)
    return kernels().f64;
  else if constexpr (sizeof(S) == 4)
    return kernels().f32;
  else
    return kernels().bf16;
}
inline const MixedKernels& mixed_kernels(DType directions) {
  return directions == DType::bf16 ? kernels().f32_with_bf16 : kernels().f32_with_f16;
}
template <typename T>
const Converters<T>& converters() {
  if constexpr (sizeof(T) == 8)
    return kernels().to_f64;
  else
    return kernels().to_f32;
}

}  // namespace gradproj::cpu

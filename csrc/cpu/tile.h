// The arithmetic of both operations on one tile: a short run of elements, every row of which is contiguous, already of the
// compute type, and (but for dense rows read in place) in L1. Compiled once per instruction set; see tile_impl.h.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace gradproj::cpu {

constexpr int kTile = 1024;  // elements: R rows of float32 fit L1 for K = 1..7
constexpr int kLanes = 8;    // float64 partial sums per pair of rows, added up once per task

template <typename T>
struct TileKernels {
  // Adds the products of rows i <= j (only i = 0 if row_only) to acc, kLanes doubles per pair, pairs in row-major order of
  // the upper triangle. Reads R n elements. Float products are summed over at most kTile / 16 elements per lane before they
  // are widened.
  void (*gram)(const T* const* rows, int num_rows, int64_t n, bool row_only, double* acc);
  // out = sum_r weights[r] rows[r]; out may be one of the rows. Reads R n elements, writes n.
  void (*combine)(T* out, const T* const* rows, const T* weights, int num_rows, int64_t n);
  // Between storage and compute type; contiguous.
  void (*load)(const char* source, DType dtype, T* out, int64_t n);
  void (*store)(const T* source, char* out, DType dtype, int64_t n);
};

struct Kernels {
  TileKernels<float> f32;
  TileKernels<double> f64;
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
const TileKernels<T>& tile_kernels();
template <>
inline const TileKernels<float>& tile_kernels<float>() { return kernels().f32; }
template <>
inline const TileKernels<double>& tile_kernels<double>() { return kernels().f64; }

}  // namespace gradproj::cpu

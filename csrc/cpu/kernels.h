// The arithmetic of gram and combine on n elements of every row, compiled once per instruction set; see kernels_impl.h.
// Rows are contiguous. A tile is a run of elements short enough to stay in L1: what has to be read more than once, or
// copied before it is used, is taken a tile at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../plan.h"

namespace gradproj::cpu {

constexpr int kTile = 768;  // elements: 3 KiB of a float32 row
constexpr int kLanes = 8;

// The inner product of two rows, as kLanes sums that are added up at the end of a chunk.
struct alignas(64) PairSum {
  double lanes[kLanes];
};

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Sums are kept in the order in which kernels go through them: of blocks of `block` rows with such blocks, upper
// triangle of blocks row by row, and inside a block its pairs row by row. To look a pair up while rows are read costs a
// tenth of the time.
inline int pair_place(int block, int num_rows, int i, int j) {
  const int top = i / block * block, left = j / block * block, height = std::min(block, num_rows - top);
  const int before = top * num_rows - top * (top - 1) / 2, diagonal = height * (height + 1) / 2;
  const int a = i - top, b = j - left;
  if (top == left) return before + a * height - a * (a - 1) / 2 + b - a;
  return before + diagonal + height * (left - top - block) + a * std::min(block, num_rows - left) + b;
}

// Kernels that read and write rows where they lie. Row 0 is the gradient; rows 1.. share a dtype, which may be another.
struct RowKernels {
  // Adds the products of all rows to sums, pair i <= j at pair_place; or if row_only those of row 0 and row j, at j.
  // `sums` is followed by scratch of equal length. Reads R n elements.
  void (*gram)(const void* const* rows, int num_rows, int64_t n, bool row_only, PairSum* sums);
  // out = sum_r weights[r] rows[r], rounded once; out has the dtype of row 0 and may be one of the rows. Reads R n
  // elements, writes n.
  void (*combine)(void* out, const void* const* rows, const double* weights, int num_rows, int64_t n);
  bool mixed;  // the directions have another dtype: gram has row_only alone
};

// Between what a row stores and T, for rows that go through a buffer.
template <typename T>
struct Converters {
  void (*load)(const char* source, DType dtype, T* out, int64_t n);
  void (*store)(const T* source, char* out, DType dtype, int64_t n);
};

struct Kernels {
  RowKernels f32, f64;
  RowKernels bf16;                         // decoded in registers: copies to tiles would cost what it saves
  RowKernels f32_with_bf16, f32_with_f16;  // directions decoded in registers
  Converters<float> to_f32;
  Converters<double> to_f64;
  int block;  // see pair_place
};

namespace portable {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

// The best that this processor runs. GRADPROJ_CPU=portable|avx2|avx512 asks for another.
const Kernels& kernels();

}  // namespace gradproj::cpu

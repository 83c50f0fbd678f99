// Kernel parameters: the segments of a plan, by value. Nothing is uploaded, so nothing has to be pinned, cached or kept
// alive, and a captured graph owns its copy. 32,764 bytes of parameters need CUDA 12.1 and compute capability 7.0.
//
//   plan      segments of all launches, ascending by part (plan.h)
//   segments  up to kMostSegments of one kernel instance, in one launch's parameters:
//
//             segment 0               segment 1                  row 0 begins off a 16-byte boundary:
//             |chunk|chunk|chunk|..|  |chunk|chunk|..|           |  xxxx|xxxxxx|xxxxxx|xx    |  x: elements
//
//   block     per_block neighbouring chunks, of one segment or of several
//   chunk     `chunk` positions of every row; a warp takes one at a time
//   lane      16 bytes of row 0 at a time, and as many elements of the others; one by one at both ends of a segment
#pragma once

#include "../plan.h"
#include "elements.cuh"

namespace gradproj::cuda {

constexpr int kMostAddresses = 2 * kMostSegments + 80;

// Elements past the preceding 16-byte boundary.
__host__ __device__ inline int lead_of(const char* address, int64_t element_bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / static_cast<unsigned>(element_bytes));
}

// Dense segments. Each is cut into chunks at multiples of `chunk` positions, counted from the last 16-byte boundary of
// row 0 before its first element; chunks are numbered through the launch. A block takes `per_block` adjacent ones.
struct Segments {
  int64_t numel[kMostSegments];
  const char* address[kMostAddresses];  // `rows` to a segment; null: the row is absent there and counts as zeros
  int32_t end[kMostSegments];           // chunks of a segment and of all before it
  int32_t part[kMostSegments];          // ascending
  int32_t count;
  int32_t rows;
  int32_t chunk;
  int32_t per_block;

  __host__ __device__ int32_t begin(int s) const { return s > 0 ? end[s - 1] : 0; }
  __host__ __device__ int32_t chunks() const { return begin(count); }
  __host__ __device__ int segment_of(int32_t c) const { return first_reaching(end, c + 1); }
  __host__ __device__ int first_of_part(int32_t p) const { return first_reaching(part, p); }

 private:
  __host__ __device__ int first_reaching(const int32_t* values, int32_t least) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (values[middle] >= least)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

// What a warp takes at a time: positions [from, to) of a segment.
struct Chunk {
  int64_t start;  // the element at position 0; negative before the first
  int from, to;
};

template <typename G>
__device__ inline Chunk chunk_of(const Segments& p, int s, int32_t c) {
  const int64_t start = int64_t{c - p.begin(s)} * p.chunk - lead_of(p.address[s * p.rows], sizeof(G));
  const int64_t left = p.numel[s] - start;
  return {start, start < 0 ? static_cast<int>(-start) : 0, left < p.chunk ? static_cast<int>(left) : p.chunk};
}

// Position 0 of a chunk in a row; null where the row is absent.
template <typename T>
__device__ inline const T* row_at(const char* address, const Chunk& chunk) {
  return address ? reinterpret_cast<const T*>(address) + chunk.start : nullptr;
}

// One segment that goes element by element: any strides, any mixture of types, computed in double.
struct StridedSegment {
  int64_t numel;
  int64_t sizes[kMaxDims];
  double inverse[kMaxDims];            // 1 / sizes: a division on the device costs a call
  int64_t strides[kMaxRows][kMaxDims];  // in elements
  const char* address[kMaxRows];       // null: absent
  DType dtype[kMaxRows];
  int32_t ndim;
  int32_t rows;
  int32_t part;
};

#ifndef GRADPROJ_EMULATION
constexpr size_t kOtherParameters = 100;  // bytes, of any kernel that takes segments
static_assert(sizeof(Segments) + kOtherParameters <= 32764 && sizeof(StridedSegment) + kOtherParameters <= 32764);
#endif

// Where an element of a strided segment lies. Its index is below 2^52: a product with the inverse is off by at most 1.
class Element {
 public:
  __device__ Element(const StridedSegment& p, int64_t i) : p_(p) {
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      at_[d] = 0;
      if (d >= p.ndim) continue;
      int64_t quotient = static_cast<int64_t>(static_cast<double>(i) * p.inverse[d]);
      int64_t rest = i - quotient * p.sizes[d];
      if (rest < 0) {
        --quotient;
        rest += p.sizes[d];
      } else if (rest >= p.sizes[d]) {
        ++quotient;
        rest -= p.sizes[d];
      }
      at_[d] = rest;
      i = quotient;
    }
  }
  __device__ double load(int r) const {
    switch (p_.dtype[r]) {
      case DType::f32: return widen(*at<float>(r));
      case DType::f64: return *at<double>(r);
      case DType::f16: return widen(*at<__half>(r));
      default: return widen(*at<__nv_bfloat16>(r));
    }
  }
  __device__ void store(double x) const {  // into row 0
    switch (p_.dtype[0]) {
      case DType::f32: return narrow(x, *at<float>(0));
      case DType::f64: return narrow(x, *at<double>(0));
      case DType::f16: return narrow(x, *at<__half>(0));
      default: return narrow(x, *at<__nv_bfloat16>(0));
    }
  }

 private:
  template <typename T>
  __device__ T* at(int r) const {
    int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < kMaxDims; ++d)
      if (d < p_.ndim) offset += at_[d] * p_.strides[r][d];
    return reinterpret_cast<T*>(const_cast<char*>(p_.address[r])) + offset;
  }

  const StridedSegment& p_;
  int64_t at_[kMaxDims];
};

}  // namespace gradproj::cuda

// Partial sums in global memory, and how they are added up: in a fixed order, without atomics. What the same buffers
// give on a device is the same to the bit, launches on different streams share nothing, and a captured graph can be
// replayed anywhere.
#pragma once

#include "runtime.h"

namespace gradproj::cuda {

// A block leaves the sums of one part in slot block + part, which is unique because both ascend along a launch. Slots
// below `written` hold sums of an earlier launch, to which those of this one are added.
struct Slots {
  double* sums;  // `pairs` doubles to a slot
  int32_t pairs;
  int32_t written;
};

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// The sum of one pair over `count` slots, by one warp: lane l adds slots l, l + 32, .., then the lanes are added up.
__device__ inline double sum_slots(const double* sums, int32_t count, int32_t pairs, int pair) {
  double sum = 0.0;
  for (int64_t s = threadIdx.x % 32; s < count; s += 32) sum += sums[s * pairs + pair];
  return warp_sum(sum);
}

// total: a lane's own sums of kPairs pairs, of which the slot wants the first `pairs`. By every thread of the block.
template <int kPairs>
__device__ void write_slot(const Slots& slots, int64_t number, const double (&total)[kPairs]) {
  __shared__ double of_warp[kWarps][kPairs];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const double sum = warp_sum(total[p]);
    if (lane == 0) of_warp[warp][p] = sum;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < slots.pairs; p += kThreads) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += of_warp[w][p];
    double& slot = slots.sums[number * slots.pairs + p];
    slot = number < slots.written ? slot + sum : sum;
  }
  __syncthreads();  // of_warp is free again
}

}  // namespace gradproj::cuda

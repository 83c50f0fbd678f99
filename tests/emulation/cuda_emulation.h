// A stand-in for the CUDA runtime that runs a kernel's own source on the CPU: one std::thread per CUDA thread of a block, one
// block after another, a barrier per block for __syncthreads and one per warp for shuffles. Sanitizers then see what a GPU
// would not tell: reads out of bounds, undefined behaviour, a missing barrier. For tests only.
#pragma once

#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x_) : x(x_) {}
};

namespace emulation {

struct Warp {
  std::barrier<> barrier{32};
  double lanes[2][32];  // by turns: who is a call ahead has passed the barrier behind which the other half is free
};

struct Block {
  explicit Block(int threads) : barrier(threads), warps(static_cast<size_t>(threads) / 32) {
    for (auto& w : warps) w = std::make_unique<Warp>();
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned exchanges = 0;
inline int launches = 0;
// A planted defect, for the test that wants to see a sanitizer find it.
inline const bool without_barriers = std::getenv("GRADPROJ_WITHOUT_BARRIERS") != nullptr;

struct Index {
  unsigned x;
};

}  // namespace emulation

inline thread_local emulation::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() {
  if (!emulation::without_barriers) emulation::block->barrier.arrive_and_wait();
}

namespace emulation {

// What all lanes of the warp put in.
inline const double* exchange(double value) {
  Warp& warp = *block->warps[threadIdx.x / 32];
  double* lanes = warp.lanes[exchanges++ % 2];
  lanes[threadIdx.x % 32] = value;
  warp.barrier.arrive_and_wait();
  return lanes;
}

}  // namespace emulation

inline double __shfl_xor_sync(unsigned, double value, int mask) {
  return emulation::exchange(value)[threadIdx.x % 32 ^ static_cast<unsigned>(mask)];
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const double* lanes = emulation::exchange(vote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= (lanes[lane] != 0.0 ? 1u : 0u) << lane;
  return votes;
}

inline void __syncwarp() { emulation::block->warps[threadIdx.x / 32]->barrier.arrive_and_wait(); }

inline int __popc(unsigned u) { return std::popcount(u); }
inline float __uint_as_float(uint32_t u) { return std::bit_cast<float>(u); }
inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline _Float16 __ushort_as_half(uint16_t u) { return std::bit_cast<_Float16>(u); }
inline uint16_t __half_as_ushort(_Float16 h) { return std::bit_cast<uint16_t>(h); }
inline float __half2float(_Float16 h) { return static_cast<float>(h); }
inline _Float16 __float2half_rn(float f) { return static_cast<_Float16>(f); }

namespace emulation {

template <typename F>
void launch(int threads, dim3 grid, const F& kernel) {
  ++launches;
  Block shared(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      block = &shared;
      exchanges = 0;
      threadIdx.x = static_cast<unsigned>(t);
      gridDim.x = grid.x;
      for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx.x = b;
        kernel();
        shared.barrier.arrive_and_wait();  // the next block reuses the shared memory
      }
    });
  for (auto& t : pool) t.join();
}

}  // namespace emulation

#define GRADPROJ_LAUNCH(kernel, grid, stream, ...)                                        \
  do {                                                                                    \
    emulation::launch(gradproj::cuda::kThreads, grid, [&] { (kernel)(__VA_ARGS__); });    \
    (void)(stream);                                                                       \
  } while (0)

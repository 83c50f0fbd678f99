// A stand-in for the CUDA runtime that runs a kernel's own source on the CPU. The threads of a block are fibers of one
// worker thread, which take turns at barriers; the blocks of a launch are dealt out to two workers, and nothing orders
// one worker's blocks before the other's. Sanitizers then see what a GPU would not tell: reads out of bounds,
// misaligned vectors, undefined behaviour, a missing barrier, two blocks at one address. For tests only, with GCC.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <semaphore>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(condition)

// For what the fibers of a worker share to take turns by: no race, but ThreadSanitizer is not told so.
#define GRADPROJ_UNSANITIZED [[gnu::noinline, gnu::no_sanitize("address", "thread", "undefined")]]

namespace emulation {

// Small, so that small buffers cross every border: two warps, and few segments to a launch.
constexpr int kThreads = 64, kMostSegments = 100;

inline int launches = 0;
// Planted defects, for the tests that want to see a sanitizer find them.
inline const bool without_barriers = std::getenv("GRADPROJ_WITHOUT_BARRIERS") != nullptr;
inline const bool same_block = std::getenv("GRADPROJ_SAME_BLOCK") != nullptr;

struct Index {
  unsigned x;
};

// Where a fiber, or the worker that runs it, is left and taken up again.
struct Context {
  void* place[5];
#ifdef __SANITIZE_ADDRESS__
  const void* stack = nullptr;
  size_t stack_bytes = 0;
#endif
#ifdef __SANITIZE_THREAD__
  void* tsan = nullptr;
#endif
};

[[noreturn]] GRADPROJ_UNSANITIZED inline void jump(Context& to) {
  __builtin_longjmp(to.place, 1);
}

GRADPROJ_UNSANITIZED inline void leave(Context& from, Context& to) {
  if (__builtin_setjmp(from.place) == 0) jump(to);
}

inline void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, to.stack, to.stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  leave(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void release(void* sync) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(sync);
#endif
  (void)sync;
}
inline void acquire(void* sync) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(sync);
#endif
  (void)sync;
}

// Of one warp or one block.
struct Barrier {
  int threads, arrived = 0;
  unsigned generation = 0;
  char sync[2];         // in turn: a thread one generation ahead does not order those that are not there yet
  double lanes[2][32];  // in turn: what the lanes of a warp put in
};

class Worker {
 public:
  Worker() : thread_([this] { work(); }) {}
  ~Worker() {
    start(nullptr, 0, 0, 0);
    thread_.join();
  }
  // Runs blocks first, first + stride, .. of a launch; null: ends.
  void start(const std::function<void()>* kernel, unsigned first, unsigned stride, unsigned blocks) {
    kernel_ = kernel, first_ = first, stride_ = stride, grid = {blocks};
    started_.release();
  }
  void wait() { finished_.acquire(); }

  // Of the running fiber.
  int thread = 0;
  Index block{0}, grid{0};

  // Barriers that also order what was written before them.
  void block_barrier() { order(block_); }
  void warp_barrier() { order(warps_[thread / 32]); }
  // What all lanes of the warp put in. Orders nothing else: neither do votes and shuffles on a device.
  GRADPROJ_UNSANITIZED const double* exchange(double value) {
    Barrier& warp = warps_[thread / 32];
    double* const lanes = warp.lanes[warp.generation % 2];
    lanes[thread % 32] = value;
    wait_at(warp, thread);
    return lanes;
  }

 private:
  static constexpr size_t kStack = 256 * 1024;
  struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    Context context;
    bool running = false;
  };

  GRADPROJ_UNSANITIZED void order(Barrier& barrier) {
    char* const sync = &barrier.sync[barrier.generation % 2];
    release(sync);
    wait_at(barrier, thread);
    acquire(sync);
  }
  GRADPROJ_UNSANITIZED void wait_at(Barrier& barrier, int fiber) {
    const unsigned generation = barrier.generation;
    progress_ = true;
    if (++barrier.arrived == barrier.threads) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (barrier.generation == generation) yield(fiber);
  }
  GRADPROJ_UNSANITIZED void yield(int fiber) {
    switch_context(fibers_[fiber].context, own_);
    thread = fiber;
  }

  static void enter(unsigned high, unsigned low, int fiber) {
    reinterpret_cast<Worker*>(static_cast<uintptr_t>(high) << 32 | low)->run_fiber(fiber);
  }
  [[noreturn]] GRADPROJ_UNSANITIZED void run_fiber(int fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &own_.stack, &own_.stack_bytes);
#endif
    for (;;) {
      yield(fiber);
      acquire(&begun_);
      (*kernel_)();
      release(&ended_);
      fibers_[fiber].running = false;
      progress_ = true;
    }
  }

  // Gives every fiber its stack and runs it up to its first yield.
  GRADPROJ_UNSANITIZED void create() {
    for (int f = 0; f < kThreads; ++f) {
      char* const stack = fibers_[f].stack.get();
#ifdef __SANITIZE_ADDRESS__
      fibers_[f].context.stack = stack;
      fibers_[f].context.stack_bytes = kStack;
      void* fake = nullptr;
      __sanitizer_start_switch_fiber(&fake, stack, kStack);
#endif
#ifdef __SANITIZE_THREAD__
      own_.tsan = __tsan_get_current_fiber();
      fibers_[f].context.tsan = __tsan_create_fiber(0);
      __tsan_switch_to_fiber(fibers_[f].context.tsan, 0);
#endif
      ucontext_t entry;
      getcontext(&entry);
      entry.uc_stack.ss_sp = stack;
      entry.uc_stack.ss_size = kStack;
      const uintptr_t self = reinterpret_cast<uintptr_t>(this);
      makecontext(&entry, reinterpret_cast<void (*)()>(&enter), 3, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self), f);
      enter_first(entry);
#ifdef __SANITIZE_ADDRESS__
      __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }
  }
  GRADPROJ_UNSANITIZED void enter_first(const ucontext_t& entry) {
    if (__builtin_setjmp(own_.place) == 0) setcontext(&entry);
  }

  GRADPROJ_UNSANITIZED void run_block() {
    block_ = {kThreads};
    for (Barrier& warp : warps_) warp = {32};
    for (Fiber& fiber : fibers_) fiber.running = true;
    release(&begun_);
    for (bool running = true; running;) {
      running = progress_ = false;
      for (int f = 0; f < kThreads; ++f) {
        if (!fibers_[f].running) continue;
        running = true;
        thread = f;
        switch_context(own_, fibers_[f].context);
      }
      if (running && !progress_) {
        std::fputs("emulation: threads wait for one another at different barriers\n", stderr);
        std::abort();
      }
    }
    acquire(&ended_);
  }

  void work();

  Fiber fibers_[kThreads];
  Context own_;
  Barrier block_{kThreads}, warps_[kThreads / 32];
  bool progress_ = false;
  char begun_ = 0, ended_ = 0;  // two: a fiber that begins late knows nothing of those that have ended

  std::binary_semaphore started_{0}, finished_{0};
  const std::function<void()>* kernel_ = nullptr;
  unsigned first_ = 0, stride_ = 0;
  std::thread thread_;  // the last: it uses the others
};

inline thread_local Worker* worker = nullptr;

inline void Worker::work() {
  worker = this;
  create();
  for (;;) {
    started_.acquire();
    if (!kernel_) return;
    for (unsigned b = first_; b < grid.x; b += stride_) {
      block = {same_block ? 0 : b};
      run_block();
    }
    finished_.release();
  }
}

inline void launch(int64_t blocks, const std::function<void()>& kernel) {
  static Worker workers[2];
  ++launches;
  for (unsigned w = 0; w < 2; ++w) workers[w].start(&kernel, w, 2, static_cast<unsigned>(blocks));
  for (Worker& w : workers) w.wait();
}

}  // namespace emulation

#define threadIdx (emulation::Index{static_cast<unsigned>(emulation::worker->thread)})
#define blockIdx (emulation::worker->block)
#define gridDim (emulation::worker->grid)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

inline void __syncthreads() {
  if (!emulation::without_barriers) emulation::worker->block_barrier();
}
inline void __syncwarp() { emulation::worker->warp_barrier(); }
inline double __shfl_xor_sync(unsigned, double value, int mask) {
  return emulation::worker->exchange(value)[threadIdx.x % 32 ^ static_cast<unsigned>(mask)];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const double* lanes = emulation::worker->exchange(vote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= (lanes[lane] != 0.0 ? 1u : 0u) << lane;
  return votes;
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

inline int __popc(unsigned u) { return std::popcount(u); }
inline int min(int a, int b) { return a < b ? a : b; }

struct float2 {
  float x, y;
};
struct double2 {
  double x, y;
};
struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half h) { return static_cast<float>(std::bit_cast<_Float16>(h.bits)); }
inline __half __double2half(double x) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))}; }
inline __half __float2half_rn(float x) { return __double2half(x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__float2half_rn(x.x), __float2half_rn(x.y)}; }

inline float __bfloat162float(__nv_bfloat16 b) { return std::bit_cast<float>(uint32_t{b.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
// By way of the float towards 0, with its last bit set where it is not exact: then nothing rounds twice.
inline __nv_bfloat16 __double2bfloat16(double x) {
  const float f = static_cast<float>(x);
  if (x != x || static_cast<double>(f) == x) return __float2bfloat16_rn(f);
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((f < 0 ? -f : f) > (x < 0 ? -x : x)) --u;
  return __float2bfloat16_rn(std::bit_cast<float>(u | 1u));
}
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {__float2bfloat16_rn(x.x), __float2bfloat16_rn(x.y)}; }

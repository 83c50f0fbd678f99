// How an op walks a plan on the CPU: its elements, all segments one after the other, in chunks of kChunk, and 2^k
// neighbouring chunks as a task of torch's threads. Where a chunk ends depends on the sizes of the segments alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "kernels.h"

namespace gradproj::cpu {

constexpr int64_t kChunk = 1 << 16;  // elements: a smaller plan is run on the calling thread
constexpr int64_t kMostTasks = 1024;

// Runs f(i) for i < count on torch's threads, each i once.
template <typename F>
void parallel(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;  // must not cross torch's C interface
  auto work = [&](int64_t, int64_t) {
    try {
      for (int64_t i = next++; i < count; i = next++) f(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
  const int64_t threads = count > 1 ? std::min<int64_t>(torch::stable::get_num_threads(), count) : 1;
  if (threads > 1)
    torch::stable::parallel_for(0, threads, 1, work);
  else
    work(0, 1);
  if (error) std::rethrow_exception(error);
}

// A run of elements of one segment.
struct Slice {
  size_t segment;
  int64_t start;  // in the segment
  int64_t n;
};

class Chunks {
 public:
  // bytes: what each task keeps until the end; all together stay under 512 KiB.
  Chunks(const Plan& plan, int64_t bytes) {
    starts_.reserve(plan.segments.size() + 1);
    int64_t total = 0;
    for (const Segment& s : plan.segments) {
      starts_.push_back(total);
      total += s.numel;
    }
    starts_.push_back(total);
    count_ = (total + kChunk - 1) / kChunk;
    const int64_t most = std::clamp((int64_t{1} << 19) / std::max<int64_t>(1, bytes), int64_t{1}, kMostTasks);
    while (tasks() > most) per_task_ *= 2;
  }
  int64_t tasks() const { return (count_ + per_task_ - 1) / per_task_; }
  // Chunks [begin, end) of a task.
  int64_t begin(int64_t task) const { return task * per_task_; }
  int64_t end(int64_t task) const { return std::min(begin(task + 1), count_); }

  // Calls f(slice) for what chunks [begin, end) have of every segment.
  template <typename F>
  void each_slice(int64_t begin, int64_t end, const F& f) const {
    int64_t at = begin * kChunk;
    const int64_t stop = std::min(end * kChunk, starts_.back());
    auto s = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), at) - starts_.begin() - 1);
    for (; at < stop; ++s) {
      const int64_t n = std::min(starts_[s + 1], stop) - at;
      f(Slice{s, at - starts_[s], n});
      at += n;
    }
  }

 private:
  std::vector<int64_t> starts_;  // of every segment, in elements, and the total
  int64_t count_;                // of chunks
  int64_t per_task_ = 1;
};

}  // namespace gradproj::cpu

// How an op walks a plan on the CPU: in chunks of a fixed number of elements, handed to torch's threads. Where a chunk ends
// depends on the plan alone, never on the number of threads, so sums are the same for any of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "kernels.h"

namespace gradproj::cpu {

constexpr int64_t kChunkElements = 1 << 16;  // at least: a smaller plan is one chunk, run on the calling thread
constexpr int64_t kMaxChunks = 1024;

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

// What a chunk has of one segment.
struct Slice {
  size_t segment;
  int64_t start;  // in the segment
  int64_t n;      // 0: there is none
};

class Chunks {
 public:
  // bytes: what each chunk keeps until the end; all together stay under 512 KiB.
  Chunks(const Plan& plan, int64_t bytes) {
    starts_.reserve(plan.segments.size() + 1);
    int64_t total = 0;
    for (const Segment& s : plan.segments) {
      starts_.push_back(total);
      total += s.numel;
    }
    starts_.push_back(total);
    const int64_t most = std::max<int64_t>(1, std::min(kMaxChunks, (int64_t{1} << 19) / std::max<int64_t>(1, bytes)));
    elements_ = std::max(kChunkElements, (total + most - 1) / most);
    elements_ = (elements_ + kTile - 1) / kTile * kTile;
  }
  int64_t count() const { return (starts_.back() + elements_ - 1) / elements_; }
  int64_t first_of(size_t segment) const { return starts_[segment] / elements_; }
  int64_t last_of(size_t segment) const { return (starts_[segment + 1] - 1) / elements_; }

  Slice first(int64_t chunk) const {
    const int64_t begin = chunk * elements_;
    const auto segment = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    return slice(static_cast<size_t>(segment), begin, chunk);
  }
  Slice next(const Slice& s, int64_t chunk) const { return slice(s.segment + 1, starts_[s.segment + 1], chunk); }

 private:
  Slice slice(size_t segment, int64_t begin, int64_t chunk) const {
    const int64_t end = std::min((chunk + 1) * elements_, starts_.back());
    if (begin >= end) return {segment, 0, 0};
    return {segment, begin - starts_[segment], std::min(starts_[segment + 1], end) - begin};
  }

  std::vector<int64_t> starts_;  // of every segment, in elements, and the total
  int64_t elements_;             // of a chunk
};

}  // namespace gradproj::cpu

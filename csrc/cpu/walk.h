// How both operations walk a plan on the CPU: chunks of a fixed number of elements, handed to torch's threads; where rows have to
// be converted, a tile at a time, which fits L1. Borders of chunks depend on the plan alone, never on the number of threads,
// so sums are the same for any of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "kernels.h"

namespace gradproj::cpu {

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}
template <typename T>
const RowKernels& tile_kernels() {
  return sizeof(T) == 8 ? kernels().f64 : kernels().f32;
}
template <typename T>
const Converters<T>& converters() {
  if constexpr (sizeof(T) == 8)
    return kernels().to_f64;
  else
    return kernels().to_f32;
}

constexpr int64_t kChunkElements = 1 << 16;  // at least: a smaller plan is one chunk, run on the calling thread
constexpr int64_t kMaxChunks = 1024;

inline bool one_dtype(const Plan& plan) {
  return std::all_of(plan.views.begin(), plan.views.end(), [&](const RowView& v) { return !v.data || v.dtype == plan.views[0].dtype; });
}

struct Chunks {
  int64_t count;
  int64_t elements;              // per chunk
  int64_t tile;                  // elements: shorter where many rows have to be converted, so that they fit L1
  std::vector<int64_t> starts;   // of every segment, in elements, and the total
};

// partial_bytes: what a chunk keeps until the end; all chunks together stay under 512 KiB.
inline Chunks make_chunks(const Plan& plan, int64_t partial_bytes) {
  Chunks chunks;
  chunks.starts.reserve(plan.segments.size() + 1);
  int64_t total = 0;
  for (const Segment& s : plan.segments) {
    chunks.starts.push_back(total);
    total += s.numel;
  }
  chunks.starts.push_back(total);
  const int64_t most = std::max<int64_t>(1, std::min(kMaxChunks, (int64_t{1} << 19) / std::max<int64_t>(1, partial_bytes)));
  chunks.elements = std::max(kChunkElements, (total + most - 1) / most);
  chunks.elements = (chunks.elements + kTile - 1) / kTile * kTile;
  chunks.count = (total + chunks.elements - 1) / chunks.elements;
  chunks.tile = plan.rows > 4 && !one_dtype(plan) ? kTile / 2 : kTile;
  return chunks;
}

// Runs f(chunk) for every chunk, on torch's thread pool. backwards: the last chunks first, for what an earlier pass left in cache.
template <typename F>
void for_each_chunk(const Chunks& chunks, bool backwards, const F& f) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;  // must not cross torch's C interface
  auto work = [&](int64_t, int64_t) {
    try {
      for (int64_t t = next++; t < chunks.count; t = next++) f(backwards ? chunks.count - 1 - t : t);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
  const int64_t threads = chunks.count > 1 ? std::min<int64_t>(torch::stable::get_num_threads(), chunks.count) : 1;
  if (threads > 1)
    torch::stable::parallel_for(0, threads, 1, work);
  else
    work(0, 1);
  if (error) std::rethrow_exception(error);
}

// Copies n elements of one row of a strided segment, from linear index `start`, between memory and a contiguous run.
// Visits runs of the innermost dimension. visit(const char* first, int64_t stride in elements, int64_t offset, int64_t count)
template <typename F>
void for_each_run(const Plan& plan, const Segment& segment, int row, int64_t start, int64_t n, const F& visit) {
  const int64_t* sizes = plan.sizes(segment);
  const int64_t* strides = plan.strides(segment, row);
  const int inner = segment.ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t index = start + done, offset = 0;
    const int64_t at = index % sizes[inner];
    index /= sizes[inner];
    for (int d = inner - 1; d >= 0; --d) {
      offset += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    const int64_t count = std::min(n - done, sizes[inner] - at);
    visit(offset + at * strides[inner], strides[inner], done, count);
    done += count;
  }
}

template <typename S>
void copy_run(const S* from, int64_t from_stride, S* to, int64_t to_stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i * to_stride] = from[i * from_stride];
}

// A tile's rows as contiguous elements of type T: dense rows of type T in place, everything else through a buffer.
template <typename T>
class TileReader {
 public:
  explicit TileReader(const Plan& plan) : plan_(plan), converters_(converters<T>()) {
    buffers_.resize(static_cast<size_t>(plan.rows));
  }

  // Row `row` of a segment, n elements from `start`. Absent rows read as zeros.
  const T* read(size_t segment_index, int row, int64_t start, int64_t n) {
    const Segment& segment = plan_.segments[segment_index];
    const RowView& view = plan_.row_views(segment_index)[row];
    if (!view.data) return zeros();
    const int64_t size = element_size(view.dtype);
    const char* dense = view.data + start * size;
    if (segment.ndim > 0) {
      dense = gathered_;
      for_each_run(plan_, segment, row, start, n, [&](int64_t offset, int64_t stride, int64_t done, int64_t count) {
        const char* from = view.data + offset * size;
        char* to = gathered_ + done * size;
        if (size == 2)
          copy_run(reinterpret_cast<const uint16_t*>(from), stride, reinterpret_cast<uint16_t*>(to), 1, count);
        else if (size == 4)
          copy_run(reinterpret_cast<const uint32_t*>(from), stride, reinterpret_cast<uint32_t*>(to), 1, count);
        else
          copy_run(reinterpret_cast<const uint64_t*>(from), stride, reinterpret_cast<uint64_t*>(to), 1, count);
      });
    } else if (view.dtype == dtype_of<T>()) {
      return reinterpret_cast<const T*>(dense);
    }
    T* out = buffer(row);
    converters_.load(dense, view.dtype, out, n);
    return out;
  }

  // Row 0 of a segment from a contiguous tile: the counterpart of read.
  void write(size_t segment_index, const T* tile, int64_t start, int64_t n) {
    const Segment& segment = plan_.segments[segment_index];
    const RowView& view = plan_.row_views(segment_index)[0];
    const int64_t size = element_size(view.dtype);
    char* data = const_cast<char*>(view.data);
    if (segment.ndim == 0) {
      if (reinterpret_cast<const char*>(tile) != data + start * size) converters_.store(tile, data + start * size, view.dtype, n);
      return;
    }
    converters_.store(tile, gathered_, view.dtype, n);
    for_each_run(plan_, segment, 0, start, n, [&](int64_t offset, int64_t stride, int64_t done, int64_t count) {
      const char* from = gathered_ + done * size;
      char* to = data + offset * size;
      if (size == 2)
        copy_run(reinterpret_cast<const uint16_t*>(from), 1, reinterpret_cast<uint16_t*>(to), stride, count);
      else if (size == 4)
        copy_run(reinterpret_cast<const uint32_t*>(from), 1, reinterpret_cast<uint32_t*>(to), stride, count);
      else
        copy_run(reinterpret_cast<const uint64_t*>(from), 1, reinterpret_cast<uint64_t*>(to), stride, count);
    });
  }

  const T* zeros() {
    if (zeros_.empty()) zeros_.assign(kTile, T(0));
    return zeros_.data();
  }

  T* buffer(int row) {
    auto& b = buffers_[static_cast<size_t>(row)];
    if (b.empty()) b.resize(kTile);
    return b.data();
  }

 private:

  const Plan& plan_;
  const Converters<T>& converters_;
  std::vector<std::vector<T>> buffers_;
  std::vector<T> zeros_;
  alignas(64) char gathered_[kTile * 8];
};

// The rows of a dense segment that a kernel walks where they lie, and that kernel; null if they have to go through tiles.
struct InPlace {
  const RowKernels* kernels = nullptr;
  std::vector<const void*> rows;

  // Takes the rows `which` of a segment from element `start`. `first_only`: gram is asked for the products of row 0.
  void take(const Plan& plan, size_t segment, const std::vector<int>& which, int64_t start, bool first_only) {
    kernels = nullptr;
    rows.clear();
    const RowView* views = plan.row_views(segment);
    if (plan.segments[segment].ndim > 0 || !views[0].data) return;
    DType others = views[0].dtype;
    for (int r : which) {
      const RowView& v = views[r];
      if (!v.data || (rows.size() > 1 && v.dtype != others) || (rows.empty() && v.dtype != views[0].dtype)) return;
      others = v.dtype;
      rows.push_back(v.data + start * element_size(v.dtype));
    }
    kernels = choose(views[0].dtype, others, which, first_only);
  }

 private:
  static const RowKernels* choose(DType gradient, DType others, const std::vector<int>& which, bool first_only) {
    const Kernels& k = cpu::kernels();
    if (gradient == others)
      return gradient == DType::f32 ? &k.f32 : gradient == DType::f64 ? &k.f64 : gradient == DType::bf16 ? &k.bf16 : nullptr;
    if (gradient != DType::f32 || which.empty() || which[0] != 0 || !first_only) return nullptr;
    return others == DType::bf16 ? &k.f32_with_bf16 : others == DType::f16 ? &k.f32_with_f16 : nullptr;
  }
};

// Runs f(segment, start, n) for the part of every segment that lies in a chunk.
template <typename F>
void for_each_run_of_chunk(const Plan& plan, const Chunks& chunks, int64_t chunk, const F& f) {
  const int64_t begin = chunk * chunks.elements, end = std::min(begin + chunks.elements, chunks.starts.back());
  size_t segment = static_cast<size_t>(std::upper_bound(chunks.starts.begin(), chunks.starts.end(), begin) - chunks.starts.begin()) - 1;
  for (int64_t at = begin; at < end; ++segment) {
    const int64_t start = at - chunks.starts[segment];
    const int64_t n = std::min(plan.segments[segment].numel - start, end - at);
    f(segment, start, n);
    at += n;
  }
}

// Runs f(start, n) for the tiles of such a run.
template <typename F>
void for_each_tile(int64_t tile, int64_t start, int64_t n, const F& f) {
  for (const int64_t end = start + n; start < end; start += tile) f(start, std::min(tile, end - start));
}

}  // namespace gradproj::cpu

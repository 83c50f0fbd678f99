// How both operations walk a plan on the CPU: tasks of a fixed number of elements, handed to torch's threads, each cut into
// tiles. Task borders depend on the plan alone, never on the number of threads, so sums are the same for any of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "tile.h"

namespace gradproj::cpu {

constexpr int64_t kTaskElements = 1 << 16;  // at least: a smaller plan is one task, run on the calling thread
constexpr int64_t kMaxTasks = 1024;

inline bool one_dtype(const Plan& plan) {
  return std::all_of(plan.views.begin(), plan.views.end(), [&](const RowView& v) { return !v.data || v.dtype == plan.views[0].dtype; });
}

struct Tasks {
  int64_t count;
  int64_t elements;              // per task
  int64_t tile;                  // elements: shorter where many rows have to be converted, so that they fit L1
  std::vector<int64_t> starts;   // of every piece, in elements, and the total
};

// partial_bytes: what a task keeps until the end; all tasks together stay under 512 KiB.
inline Tasks make_tasks(const Plan& plan, int64_t partial_bytes) {
  Tasks tasks;
  tasks.starts.reserve(plan.pieces.size() + 1);
  int64_t total = 0;
  for (const Piece& p : plan.pieces) {
    tasks.starts.push_back(total);
    total += p.numel;
  }
  tasks.starts.push_back(total);
  const int64_t most = std::max<int64_t>(1, std::min(kMaxTasks, (int64_t{1} << 19) / std::max<int64_t>(1, partial_bytes)));
  tasks.elements = std::max(kTaskElements, (total + most - 1) / most);
  tasks.elements = (tasks.elements + kTile - 1) / kTile * kTile;
  tasks.count = (total + tasks.elements - 1) / tasks.elements;
  tasks.tile = plan.rows > 4 && !one_dtype(plan) ? kTile / 2 : kTile;
  return tasks;
}

// Runs f(task) for every task, on torch's thread pool. backwards: the last tasks first, for what an earlier pass left in cache.
template <typename F>
void for_each_task(const Tasks& tasks, bool backwards, const F& f) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;  // must not cross torch's C interface
  auto work = [&](int64_t, int64_t) {
    try {
      for (int64_t t = next++; t < tasks.count; t = next++) f(backwards ? tasks.count - 1 - t : t);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
  const int64_t threads = tasks.count > 1 ? std::min<int64_t>(torch::stable::get_num_threads(), tasks.count) : 1;
  if (threads > 1)
    torch::stable::parallel_for(0, threads, 1, work);
  else
    work(0, 1);
  if (error) std::rethrow_exception(error);
}

// Copies n elements of one row of a strided piece, from linear index `start`, between memory and a contiguous run.
// Visits runs of the innermost dimension. visit(const char* first, int64_t stride in elements, int64_t offset, int64_t count)
template <typename F>
void for_each_run(const Plan& plan, const Piece& piece, int row, int64_t start, int64_t n, const F& visit) {
  const int64_t* sizes = plan.sizes(piece);
  const int64_t* strides = plan.strides(piece, row);
  const int inner = piece.ndim - 1;
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

  // Row `row` of `piece`, n elements from `start`. Absent rows read as zeros.
  const T* read(size_t piece_index, int row, int64_t start, int64_t n) {
    const Piece& piece = plan_.pieces[piece_index];
    const RowView& view = plan_.row_views(piece_index)[row];
    if (!view.data) return zeros();
    const int64_t size = element_size(view.dtype);
    const char* dense = view.data + start * size;
    if (piece.ndim > 0) {
      dense = gathered_;
      for_each_run(plan_, piece, row, start, n, [&](int64_t offset, int64_t stride, int64_t done, int64_t count) {
        const char* from = view.data + offset * size;
        char* to = gathered_ + done * size;
        if (size == 1)
          copy_run(reinterpret_cast<const uint8_t*>(from), stride, reinterpret_cast<uint8_t*>(to), 1, count);
        else if (size == 2)
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
    if (view.dtype == DType::f8 && piece.ndim == 0) {
      converters_.load_blocks(view.data, view.scale, start, out, n);
      return out;
    }
    converters_.load(dense, view.dtype, out, n);
    if (view.dtype == DType::f8)
      for_each_run(plan_, piece, row, start, n, [&](int64_t offset, int64_t stride, int64_t done, int64_t count) {
        for (int64_t i = 0; i < count; ++i) out[done + i] *= static_cast<T>(view.scale[(offset + i * stride) / kScaleBlock]);
      });
    return out;
  }

  // Whether gradient() is row 0's own memory, for a run of any length, and what is written there needs no write().
  bool in_place(size_t piece_index) const {
    return plan_.pieces[piece_index].ndim == 0 && plan_.row_views(piece_index)[0].dtype == dtype_of<T>() && !plan_.base;
  }

  // What row 0 stands for: itself, or base - row 0.
  const T* gradient(size_t piece_index, int64_t start, int64_t n) {
    const T* row0 = read(piece_index, 0, start, n);
    if (!plan_.base) return row0;
    const T* base = read(piece_index, plan_.rows - 1, start, n);
    T* out = buffer(0);
    for (int64_t i = 0; i < n; ++i) out[i] = base[i] - row0[i];
    return out;
  }

  // Row 0 of `piece` from a contiguous tile: the counterpart of read.
  void write(size_t piece_index, const T* tile, int64_t start, int64_t n) {
    const Piece& piece = plan_.pieces[piece_index];
    const RowView& view = plan_.row_views(piece_index)[0];
    const int64_t size = element_size(view.dtype);
    char* data = const_cast<char*>(view.data);
    if (piece.ndim == 0) {
      if (reinterpret_cast<const char*>(tile) != data + start * size) converters_.store(tile, data + start * size, view.dtype, n);
      return;
    }
    converters_.store(tile, gathered_, view.dtype, n);
    for_each_run(plan_, piece, 0, start, n, [&](int64_t offset, int64_t stride, int64_t done, int64_t count) {
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

// Rows of a dense piece that all store S, from element `start`: kernels read and write them in place, in one walk.
template <typename S>
struct InPlace {
  S* gradient = nullptr;
  std::vector<const S*> rows;

  // Takes the rows `which`. False if one of them or row 0 is absent or stores something else, or row 0 is not meant as it is.
  bool take(const Plan& plan, size_t piece, const std::vector<int>& which, int64_t start) {
    const RowView* views = plan.row_views(piece);
    if (plan.pieces[piece].ndim > 0 || plan.base || !views[0].data || views[0].dtype != dtype_of<S>()) return false;
    gradient = reinterpret_cast<S*>(const_cast<char*>(views[0].data)) + start;
    rows.clear();
    for (int r : which) {
      if (!views[r].data || views[r].dtype != dtype_of<S>()) return false;
      rows.push_back(reinterpret_cast<const S*>(views[r].data) + start);
    }
    return true;
  }
};

// Directions of a dense piece as they are stored, of another type than what is computed in.
struct StoredRows {
  std::vector<const void*> data;
  std::vector<const float*> scales;
  DType dtype = DType::f64;

  // Takes the rows `which`, 0 left out. False if one is absent or needs no decoding, or their types differ: then tiles are read.
  bool take(const Plan& plan, size_t piece, const std::vector<int>& which) {
    data.clear();
    scales.clear();
    if (plan.pieces[piece].ndim > 0 || plan.any_f64) return false;
    const RowView* views = plan.row_views(piece);
    for (int r : which) {
      if (r == 0) continue;
      if (!views[r].data || views[r].dtype == DType::f32 || (!data.empty() && views[r].dtype != dtype)) return false;
      dtype = views[r].dtype;
      data.push_back(views[r].data);
      scales.push_back(views[r].scale);
    }
    return !data.empty();
  }
};

// Runs f(piece, start, n) for the part of every piece that lies in a task.
template <typename F>
void for_each_span(const Plan& plan, const Tasks& tasks, int64_t task, const F& f) {
  const int64_t begin = task * tasks.elements, end = std::min(begin + tasks.elements, tasks.starts.back());
  size_t piece = static_cast<size_t>(std::upper_bound(tasks.starts.begin(), tasks.starts.end(), begin) - tasks.starts.begin()) - 1;
  for (int64_t at = begin; at < end; ++piece) {
    const int64_t start = at - tasks.starts[piece];
    const int64_t n = std::min(plan.pieces[piece].numel - start, end - at);
    f(piece, start, n);
    at += n;
  }
}

// Runs f(start, n) for the tiles of a span.
template <typename F>
void for_each_tile(int64_t tile, int64_t start, int64_t n, const F& f) {
  for (const int64_t end = start + n; start < end; start += tile) f(start, std::min(tile, end - start));
}

}  // namespace gradproj::cpu

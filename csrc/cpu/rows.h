// The rows of a slice as kernels take them: where they lie, or through a buffer.
#pragma once

#include "walk.h"

namespace gradproj::cpu {

// The kernels for a gradient and directions of these dtypes that read them where they lie; null: there are none.
inline const RowKernels* row_kernels(DType gradient, DType direction) {
  const Kernels& k = kernels();
  if (gradient == DType::f32 && direction == DType::f32) return &k.f32;
  if (gradient == DType::f64 && direction == DType::f64) return &k.f64;
  if (gradient == DType::bf16 && direction == DType::bf16) return &k.bf16;
  if (gradient == DType::f32 && direction == DType::bf16) return &k.f32_with_bf16;
  if (gradient == DType::f32 && direction == DType::f16) return &k.f32_with_f16;
  return nullptr;
}

// The kernels that read the rows `which` (ascending) of a segment as they are stored, absent ones aside; null: there
// are none.
inline const RowKernels* stored_kernels(const Plan& plan, size_t segment, const std::vector<int>& which) {
  const RowView* views = plan.row_views(segment);
  const RowView* direction = nullptr;  // the first that is present
  for (int r : which) {
    if (r == 0 || !views[r].data) continue;
    if (!direction) direction = &views[r];
    if (views[r].dtype != direction->dtype) return nullptr;
  }
  const RowView* gradient = views[0].data ? &views[0] : direction;
  if (!direction) direction = gradient;
  if (plan.any_f64 && gradient->dtype != DType::f64) return nullptr;
  const bool read = !which.empty() && which[0] == 0;  // else a direction is the first row that the kernels see
  return read || direction->dtype == gradient->dtype ? row_kernels(gradient->dtype, direction->dtype) : nullptr;
}

// Whether no row of a segment is absent or strided.
inline bool all_in_memory(const Plan& plan, size_t segment) {
  const RowView* views = plan.row_views(segment);
  auto present = [](const RowView& view) { return view.data != nullptr; };
  return plan.segments[segment].ndim == 0 && std::all_of(views, views + plan.rows, present);
}

// Copies n elements of a row of a strided segment, from linear index `start`, between memory and a contiguous tile, run
// by run of the innermost dimension.
template <bool kToTile, typename U>
void move_elements(const Plan& plan, const Segment& segment, int row, int64_t start, int64_t n, U* memory, U* tile) {
  const int64_t *sizes = plan.sizes(segment), *strides = plan.strides(segment, row);
  const int inner = segment.ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t index = (start + done) / sizes[inner];
    const int64_t at = (start + done) % sizes[inner], count = std::min(n - done, sizes[inner] - at);
    int64_t offset = at * strides[inner];
    for (int d = inner - 1; d >= 0; --d) {
      offset += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    U *run = memory + offset, *in_tile = tile + done;
    for (int64_t i = 0; i < count; ++i)
      if constexpr (kToTile)
        in_tile[i] = run[i * strides[inner]];
      else
        run[i * strides[inner]] = in_tile[i];
    done += count;
  }
}

template <bool kToTile>
void move_tile(const Plan& plan, size_t segment, int row, int64_t start, int64_t n, void* tile) {
  const RowView& view = plan.row_views(segment)[row];
  auto move = [&]<typename U>(U* to) {
    U* memory = reinterpret_cast<U*>(const_cast<char*>(view.data));
    move_elements<kToTile>(plan, plan.segments[segment], row, start, n, memory, to);
  };
  switch (element_size(view.dtype)) {
    case 2: return move(static_cast<uint16_t*>(tile));
    case 4: return move(static_cast<uint32_t*>(tile));
    default: return move(static_cast<uint64_t*>(tile));
  }
}

// Any rows at all as contiguous elements of type T, up to a tile at a time.
template <typename T>
class TileReader {
 public:
  explicit TileReader(const Plan& plan) : plan_(plan), buffers_(plan.rows) {}

  // n elements of a row from `start` of the segment; zeros for an absent row.
  const T* read(size_t segment, int row, int64_t start, int64_t n) {
    const RowView& view = plan_.row_views(segment)[row];
    if (!view.data || view.dtype == kDType) return static_cast<const T*>(stored(segment, row, start, n));
    const char* from = view.data + start * element_size(view.dtype);
    if (plan_.segments[segment].ndim > 0) {
      move_tile<true>(plan_, segment, row, start, n, stored_);
      from = stored_;
    }
    converters().load(from, view.dtype, buffer(row), n);
    return buffer(row);
  }

  // The same in the dtype of the row.
  const void* stored(size_t segment, int row, int64_t start, int64_t n) {
    const RowView& view = plan_.row_views(segment)[row];
    if (view.data && plan_.segments[segment].ndim == 0) return view.data + start * element_size(view.dtype);
    if (view.data)
      move_tile<true>(plan_, segment, row, start, n, buffer(row));
    else
      std::fill_n(buffer(row), n, T(0));
    return buffer(row);
  }

  // Row 0 from a tile: the counterpart of read.
  void write(size_t segment, const T* tile, int64_t start, int64_t n) {
    const RowView& view = plan_.row_views(segment)[0];
    if (plan_.segments[segment].ndim == 0)
      return converters().store(tile, const_cast<char*>(view.data) + start * element_size(view.dtype), view.dtype, n);
    converters().store(tile, stored_, view.dtype, n);
    move_tile<false>(plan_, segment, 0, start, n, stored_);
  }

  T* buffer(int row) {
    buffers_[row].resize(kTile);
    return buffers_[row].data();
  }

  // For tiles.
  static const RowKernels& kernels_of_t() { return sizeof(T) == 8 ? kernels().f64 : kernels().f32; }

 private:
  static constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
  static const Converters<T>& converters() {
    if constexpr (sizeof(T) == 8)
      return kernels().to_f64;
    else
      return kernels().to_f32;
  }

  const Plan& plan_;
  std::vector<std::vector<T>> buffers_;
  alignas(64) char stored_[kTile * 8];
};

}  // namespace gradproj::cpu

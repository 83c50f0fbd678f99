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

// The kernels that read all rows of a segment as they are stored, absent ones aside; null: there are none.
inline const RowKernels* stored_kernels(const Plan& plan, size_t segment, bool row_only) {
  const RowView* views = plan.row_views(segment);
  const RowView* other = nullptr;  // the first direction that is present
  for (int r = 1; r < plan.rows; ++r) {
    if (!views[r].data) continue;
    if (!other) other = &views[r];
    if (views[r].dtype != other->dtype) return nullptr;
  }
  const DType gradient = (views[0].data ? views[0] : *other).dtype;
  if (plan.any_f64 && gradient != DType::f64) return nullptr;
  const RowKernels* found = row_kernels(gradient, other ? other->dtype : gradient);
  return found && (row_only || !found->mixed) ? found : nullptr;
}

// Whether no row of a segment is absent or strided.
inline bool all_in_memory(const Plan& plan, size_t segment) {
  const RowView* views = plan.row_views(segment);
  return plan.segments[segment].ndim == 0 && std::all_of(views, views + plan.rows, [](const RowView& v) { return v.data; });
}

// The kernels that read the rows `which` (ascending) of a slice where they lie, and the addresses of those rows. Null
// if a row is absent or strided, or there are no such kernels: then a buffer has to do.
inline const RowKernels* in_place(const Plan& plan, const Slice& s, const std::vector<int>& which,
                                  std::vector<const void*>& rows) {
  const RowView* views = plan.row_views(s.segment);
  const DType gradient = views[0].dtype;
  const bool reads_gradient = !which.empty() && which[0] == 0;
  const DType direction = which.size() > reads_gradient ? views[which[reads_gradient]].dtype : gradient;
  if (plan.segments[s.segment].ndim > 0 || (plan.any_f64 && gradient != DType::f64)) return nullptr;
  if (!reads_gradient && direction != gradient) return nullptr;  // kernels take row 0 for one of the gradient's dtype
  rows.clear();
  for (int r : which) {
    if (!views[r].data || (r > 0 && views[r].dtype != direction)) return nullptr;
    rows.push_back(views[r].data + s.start * element_size(views[r].dtype));
  }
  return row_kernels(gradient, direction);
}

// Copies n elements of a row of a strided segment, from linear index `start`, between memory and a contiguous tile, run
// by run of the innermost dimension.
template <typename U, bool kToTile>
void move_elements(const Plan& plan, const Segment& segment, int row, int64_t start, int64_t n, char* memory, char* tile) {
  const int64_t *sizes = plan.sizes(segment), *strides = plan.strides(segment, row);
  const int inner = segment.ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t index = (start + done) / sizes[inner], offset = (start + done) % sizes[inner] * strides[inner];
    const int64_t count = std::min(n - done, sizes[inner] - (start + done) % sizes[inner]);
    for (int d = inner - 1; d >= 0; --d) {
      offset += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    U *from = reinterpret_cast<U*>(memory) + offset, *to = reinterpret_cast<U*>(tile) + done;
    for (int64_t i = 0; i < count; ++i)
      if constexpr (kToTile)
        to[i] = from[i * strides[inner]];
      else
        from[i * strides[inner]] = to[i];
    done += count;
  }
}

template <bool kToTile>
void move_tile(const Plan& plan, size_t segment, int row, int64_t start, int64_t n, char* tile) {
  const RowView& view = plan.row_views(segment)[row];
  const Segment& s = plan.segments[segment];
  char* memory = const_cast<char*>(view.data);
  switch (element_size(view.dtype)) {
    case 2: return move_elements<uint16_t, kToTile>(plan, s, row, start, n, memory, tile);
    case 4: return move_elements<uint32_t, kToTile>(plan, s, row, start, n, memory, tile);
    default: return move_elements<uint64_t, kToTile>(plan, s, row, start, n, memory, tile);
  }
}

// Any rows at all as contiguous elements of type T, up to a tile at a time.
template <typename T>
class TileReader {
 public:
  explicit TileReader(const Plan& plan) : plan_(plan), buffers_(static_cast<size_t>(plan.rows)) {}

  // n elements of a row from `start` of the segment; zeros for an absent row.
  const T* read(size_t segment, int row, int64_t start, int64_t n) {
    const RowView& view = plan_.row_views(segment)[row];
    T* out = buffer(row);
    if (!view.data) {
      std::fill_n(out, n, T(0));
      return out;
    }
    const char* from = view.data + start * element_size(view.dtype);
    if (plan_.segments[segment].ndim > 0) {
      move_tile<true>(plan_, segment, row, start, n, stored_);
      from = stored_;
    } else if (view.dtype == kDType) {
      return reinterpret_cast<const T*>(from);
    }
    converters().load(from, view.dtype, out, n);
    return out;
  }

  // The same in the dtype of the row.
  const void* stored(size_t segment, int row, int64_t start, int64_t n) {
    const RowView& view = plan_.row_views(segment)[row];
    if (!view.data) {
      std::fill_n(buffer(row), n, T(0));
      return buffer(row);
    }
    if (plan_.segments[segment].ndim == 0) return view.data + start * element_size(view.dtype);
    move_tile<true>(plan_, segment, row, start, n, reinterpret_cast<char*>(buffer(row)));
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
    auto& b = buffers_[static_cast<size_t>(row)];
    b.resize(kTile);
    return b.data();
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

#include "combine.h"

#include "walk.h"

namespace gradproj::cpu {
namespace {

// The rows of a part that have to be read.
std::vector<int> used_rows(const double* weights, int rows) {
  std::vector<int> used;
  for (int r = 0; r < rows; ++r)
    if (weights[r] != 0.0) used.push_back(r);
  return used;
}

bool unchanged(const double* weights, const std::vector<int>& used) {
  return used.size() == 1 && used[0] == 0 && weights[0] == 1.0;
}

template <typename T>
void combine_typed(const Plan& plan, const double* weights) {
  const int R = plan.gram_rows();
  bool nothing = true;
  for (int p = 0; p < plan.parts && nothing; ++p) nothing = unchanged(weights + p * R, used_rows(weights + p * R, R));
  if (nothing) return;
  const Tasks tasks = make_tasks(plan, 0);

  for_each_task(tasks, true, [&](int64_t task) {
    std::vector<int> used;
    std::vector<T> scale, tile_scale;
    std::vector<const T*> rows;
    InPlace<T> whole;
    InPlace<BF16> halves;
    StoredRows stored;
    TileReader<T> reader(plan);
    int part = -1;
    for_each_span(plan, tasks, task, [&](size_t piece, int64_t start, int64_t n) {
      const double* w = weights + int64_t{plan.pieces[piece].part} * R;
      if (plan.pieces[piece].part != part) {
        part = plan.pieces[piece].part;
        used = used_rows(w, R);
        scale.clear();
        for (int r : used) scale.push_back(static_cast<T>(w[r]));
      }
      if (plan.parts > 1 && unchanged(w, used)) return;
      const int count_used = static_cast<int>(used.size());
      if (whole.take(plan, piece, used, start))
        return row_kernels<T, T>().combine(whole.gradient, whole.rows.data(), scale.data(), count_used, n);
      const int reads_gradient = !used.empty() && used[0] == 0;
      bool decoded = false;
      if constexpr (sizeof(T) == 4) {
        if (halves.take(plan, piece, used, start))
          return row_kernels<T, BF16>().combine(halves.gradient, halves.rows.data(), scale.data(), count_used, n);
        decoded = stored.take(plan, piece, used);
      }
      const RowView* views = plan.row_views(piece);
      const bool in_place = reader.in_place(piece);
      for_each_tile(decoded && in_place && reads_gradient ? n : tasks.tile, start, n, [&](int64_t at, int64_t count) {
        T* out = in_place ? reinterpret_cast<T*>(const_cast<char*>(views[0].data)) + at : reader.buffer(0);
        if (decoded) {
          if constexpr (sizeof(T) == 4)
            stored_kernels(stored.dtype)
                .combine(out, reads_gradient ? reader.gradient(piece, at, count) : reader.zeros(), reads_gradient ? scale[0] : 0,
                         stored.data.data(), stored.scales.data(), scale.data() + reads_gradient, count_used - reads_gradient, at,
                         count);
        } else {
          rows.clear();
          tile_scale.clear();
          for (int i = 0; i < count_used; ++i) {
            const int r = used[static_cast<size_t>(i)];
            if (!views[r].data) continue;
            rows.push_back(r == 0 ? reader.gradient(piece, at, count) : reader.read(piece, r, at, count));
            tile_scale.push_back(scale[static_cast<size_t>(i)]);
          }
          row_kernels<T, T>().combine(out, rows.data(), tile_scale.data(), static_cast<int>(rows.size()), count);
        }
        if (plan.base) {
          const T* base = reader.read(piece, plan.rows - 1, at, count);
          for (int64_t i = 0; i < count; ++i) out[i] = base[i] - out[i];
        }
        reader.write(piece, out, at, count);
      });
    });
  });
}

}  // namespace

void combine(const Plan& plan, const double* weights) {
  plan.any_f64 ? combine_typed<double>(plan, weights) : combine_typed<float>(plan, weights);
}

}  // namespace gradproj::cpu

#include "combine.h"

#include "walk.h"

namespace gradproj::cpu {
namespace {

template <typename T>
void combine_typed(const Plan& plan, const double* weights) {
  std::vector<int> used;
  for (int r = 0; r < plan.rows; ++r)
    if (weights[r] != 0.0) used.push_back(r);
  if (used.size() == 1 && used[0] == 0 && weights[0] == 1.0) return;
  const Tasks tasks = make_tasks(plan, 0);

  for_each_task(tasks, true, [&](int64_t task) {
    std::vector<const T*> rows;
    std::vector<const BF16*> halves;
    std::vector<T> scale;
    TileReader<T> reader(plan);
    for_each_tile(plan, tasks, task, [&](size_t piece, int64_t start, int64_t n) {
      const RowView* views = plan.row_views(piece);
      char* gradient = const_cast<char*>(views[0].data);
      rows.clear();
      halves.clear();
      scale.clear();
      if constexpr (sizeof(T) == 4)
        if (stored_as<BF16>(plan, piece)) {
          for (int r : used) {
            halves.push_back(reinterpret_cast<const BF16*>(views[r].data) + start);
            scale.push_back(static_cast<T>(weights[r]));
          }
          if (!halves.empty())
            return row_kernels<T, BF16>().combine(reinterpret_cast<BF16*>(gradient) + start, halves.data(), scale.data(),
                                                  static_cast<int>(halves.size()), n);
        }
      for (int r : used) {
        if (!views[r].data) continue;
        rows.push_back(reader.read(piece, r, start, n));
        scale.push_back(static_cast<T>(weights[r]));
      }
      const bool in_place = plan.pieces[piece].ndim == 0 && views[0].dtype == dtype_of<T>();
      T* out = in_place ? reinterpret_cast<T*>(gradient) + start : reader.buffer(0);
      if (rows.empty())
        std::fill(out, out + n, T(0));
      else
        row_kernels<T, T>().combine(out, rows.data(), scale.data(), static_cast<int>(rows.size()), n);
      reader.write(piece, out, start, n);
    });
  });
}

}  // namespace

void combine(const Plan& plan, const double* weights) {
  plan.any_f64 ? combine_typed<double>(plan, weights) : combine_typed<float>(plan, weights);
}

}  // namespace gradproj::cpu

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
    std::vector<const T*> rows;
    std::vector<const BF16*> halves;
    std::vector<T> scale;
    TileReader<T> reader(plan);
    StoredRows stored;
    int part = -1;
    const double* w = nullptr;
    std::vector<int> used;
    for_each_tile(plan, tasks, task, [&](size_t piece, int64_t start, int64_t n) {
      if (plan.pieces[piece].part != part) {
        part = plan.pieces[piece].part;
        w = weights + int64_t{part} * R;
        used = used_rows(w, R);
      }
      if (plan.parts > 1 && unchanged(w, used)) return;
      const RowView* views = plan.row_views(piece);
      char* gradient = const_cast<char*>(views[0].data);
      rows.clear();
      halves.clear();
      scale.clear();
      if constexpr (sizeof(T) == 4)
        if (stored_as<BF16>(plan, piece)) {
          for (int r : used) {
            halves.push_back(reinterpret_cast<const BF16*>(views[r].data) + start);
            scale.push_back(static_cast<T>(w[r]));
          }
          if (!halves.empty())
            return row_kernels<T, BF16>().combine(reinterpret_cast<BF16*>(gradient) + start, halves.data(), scale.data(),
                                                  static_cast<int>(halves.size()), n);
        }
      const bool in_place = plan.pieces[piece].ndim == 0 && views[0].dtype == dtype_of<T>() && !plan.base;
      T* out = in_place ? reinterpret_cast<T*>(gradient) + start : reader.buffer(0);
      auto combine_tiles = [&] {
        for (int r : used) {
          if (!views[r].data) continue;
          rows.push_back(r == 0 ? reader.gradient(piece, start, n) : reader.read(piece, r, start, n));
          scale.push_back(static_cast<T>(w[r]));
        }
        if (rows.empty())
          std::fill(out, out + n, T(0));
        else
          row_kernels<T, T>().combine(out, rows.data(), scale.data(), static_cast<int>(rows.size()), n);
      };
      if constexpr (sizeof(T) == 4) {
        if (!stored_as<T>(plan, piece) && stored.take(plan, piece, used)) {
          for (int r : used)
            if (r > 0) scale.push_back(static_cast<T>(w[r]));
          const T* g = used[0] == 0 ? reader.gradient(piece, start, n) : reader.zeros();
          stored_kernels(stored.dtype).combine(out, g, used[0] == 0 ? static_cast<T>(w[0]) : T(0), stored.data.data(),
                                               stored.scales.data(), scale.data(), static_cast<int>(scale.size()), start, n);
        } else {
          combine_tiles();
        }
      } else {
        combine_tiles();
      }
      if (plan.base) {
        const T* base = reader.read(piece, plan.rows - 1, start, n);
        for (int64_t i = 0; i < n; ++i) out[i] = base[i] - out[i];
      }
      reader.write(piece, out, start, n);
    });
  });
}

}  // namespace

void combine(const Plan& plan, const double* weights) {
  plan.any_f64 ? combine_typed<double>(plan, weights) : combine_typed<float>(plan, weights);
}

}  // namespace gradproj::cpu

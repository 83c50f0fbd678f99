#include "gram.h"

#include "walk.h"

namespace gradproj::cpu {
namespace {

template <typename T>
void gram_typed(const Plan& plan, const double* known, double* gram) {
  const int R = plan.rows;
  const bool row_only = known != nullptr;
  const int64_t pairs = row_only ? R : int64_t{R} * (R + 1) / 2;
  const Tasks tasks = make_tasks(plan, pairs * 8);
  std::vector<double> partial(static_cast<size_t>(tasks.count * pairs));

  for_each_task(tasks, false, [&](int64_t task) {
    std::vector<double> acc(static_cast<size_t>(pairs * kLanes), 0.0);
    std::vector<const T*> rows(static_cast<size_t>(R));
    std::vector<const BF16*> halves(static_cast<size_t>(R));
    TileReader<T> reader(plan);
    for_each_tile(plan, tasks, task, [&](size_t piece, int64_t start, int64_t n) {
      if constexpr (sizeof(T) == 4)
        if (stored_as<BF16>(plan, piece)) {
          for (int r = 0; r < R; ++r)
            halves[static_cast<size_t>(r)] = reinterpret_cast<const BF16*>(plan.row_views(piece)[r].data) + start;
          return row_kernels<T, BF16>().gram(halves.data(), R, n, row_only, acc.data());
        }
      for (int r = 0; r < R; ++r) rows[static_cast<size_t>(r)] = reader.read(piece, r, start, n);
      row_kernels<T, T>().gram(rows.data(), R, n, row_only, acc.data());
    });
    for (int64_t p = 0; p < pairs; ++p) {
      double total = 0.0;
      for (int l = 0; l < kLanes; ++l) total += acc[static_cast<size_t>(p * kLanes + l)];
      partial[static_cast<size_t>(task * pairs + p)] = total;
    }
  });

  int64_t p = 0;
  for (int i = 0; i < R; ++i)
    for (int j = i; j < R; ++j) {
      double total = 0.0;
      if (row_only && i > 0)
        total = known[(i - 1) * (R - 1) + j - 1];
      else
        for (int64_t t = 0; t < tasks.count; ++t) total += partial[static_cast<size_t>(t * pairs + p)];
      gram[i * R + j] = gram[j * R + i] = total;
      ++p;
    }
}

}  // namespace

void gram(const Plan& plan, const double* known, double* gram) {
  plan.any_f64 ? gram_typed<double>(plan, known, gram) : gram_typed<float>(plan, known, gram);
}

}  // namespace gradproj::cpu

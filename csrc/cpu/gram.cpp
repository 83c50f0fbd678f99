#include "gram.h"

#include "walk.h"

namespace gradproj::cpu {
namespace {

// Sums of one task and one part have a slot of their own, number task + part. No two share one: tasks and parts both ascend
// along the plan, so of two neighbouring pairs at least one number is larger.
class Partials {
 public:
  Partials(const Plan& plan, const Tasks& tasks, int64_t pairs)
      : tasks_(tasks), pairs_(pairs), sums_(static_cast<size_t>((tasks.count + plan.parts) * pairs)) {
    range_.assign(static_cast<size_t>(plan.parts) * 2, 0);
    for (size_t p = plan.pieces.size(); p-- > 0;) {
      int64_t* range = &range_[static_cast<size_t>(plan.pieces[p].part) * 2];
      range[0] = tasks.starts[p];
      if (range[1] == 0) range[1] = tasks.starts[p + 1];
    }
  }
  double* slot(int64_t task, int part) { return &sums_[static_cast<size_t>((task + part) * pairs_)]; }
  double sum(int part, int64_t pair) {
    const int64_t begin = range_[static_cast<size_t>(part) * 2], end = range_[static_cast<size_t>(part) * 2 + 1];
    double total = 0.0;
    for (int64_t t = begin / tasks_.elements; begin < end && t <= (end - 1) / tasks_.elements; ++t) total += slot(t, part)[pair];
    return total;
  }

 private:
  const Tasks& tasks_;
  int64_t pairs_;
  std::vector<double> sums_;
  std::vector<int64_t> range_;  // of every part: first and past the last element
};

template <typename T>
void gram_typed(const Plan& plan, const double* known, double* gram) {
  const int R = plan.gram_rows();
  const bool row_only = known != nullptr;
  const int64_t pairs = row_only ? R : int64_t{R} * (R + 1) / 2;
  const Tasks tasks = make_tasks(plan, pairs * 8);
  Partials partials(plan, tasks, pairs);
  std::vector<int> all(static_cast<size_t>(R));
  std::iota(all.begin(), all.end(), 0);

  for_each_task(tasks, false, [&](int64_t task) {
    std::vector<double> acc(static_cast<size_t>(pairs * kLanes), 0.0);
    std::vector<const T*> rows(static_cast<size_t>(R));
    InPlace<T> whole;
    InPlace<BF16> halves;
    StoredRows stored;
    TileReader<T> reader(plan);
    int part = -1;
    auto finish_part = [&] {
      for (int64_t p = 0; part >= 0 && p < pairs; ++p) {
        double total = 0.0;
        for (int l = 0; l < kLanes; ++l) total += acc[static_cast<size_t>(p * kLanes + l)];
        partials.slot(task, part)[p] = total;
      }
      std::fill(acc.begin(), acc.end(), 0.0);
    };
    for_each_span(plan, tasks, task, [&](size_t piece, int64_t start, int64_t n) {
      if (plan.pieces[piece].part != part) {
        finish_part();
        part = plan.pieces[piece].part;
      }
      if (whole.take(plan, piece, all, start)) return row_kernels<T, T>().gram(whole.rows.data(), R, n, row_only, acc.data());
      if constexpr (sizeof(T) == 4) {
        if (halves.take(plan, piece, all, start))
          return row_kernels<T, BF16>().gram(halves.rows.data(), R, n, row_only, acc.data());
        if (row_only && stored.take(plan, piece, all))
          return for_each_tile(reader.in_place(piece) ? n : tasks.tile, start, n, [&](int64_t at, int64_t count) {
            stored_kernels(stored.dtype)
                .products(reader.gradient(piece, at, count), stored.data.data(), stored.scales.data(), R - 1, at, count, acc.data());
          });
      }
      for_each_tile(tasks.tile, start, n, [&](int64_t at, int64_t count) {
        rows[0] = reader.gradient(piece, at, count);
        for (int r = 1; r < R; ++r) rows[static_cast<size_t>(r)] = reader.read(piece, r, at, count);
        row_kernels<T, T>().gram(rows.data(), R, count, row_only, acc.data());
      });
    });
    finish_part();
  });

  for (int part = 0; part < plan.parts; ++part) {
    int64_t p = 0;
    for (int i = 0; i < R; ++i)
      for (int j = i; j < R; ++j) {
        const double total = row_only && i > 0 ? known[(i - 1) * (R - 1) + j - 1] : partials.sum(part, p);
        gram[i * R + j] = gram[j * R + i] = total;
        ++p;
      }
    gram += int64_t{R} * R;
    if (known) known += int64_t{R - 1} * (R - 1);
  }
}

}  // namespace

void gram(const Plan& plan, const double* known, double* gram) {
  plan.any_f64 ? gram_typed<double>(plan, known, gram) : gram_typed<float>(plan, known, gram);
}

}  // namespace gradproj::cpu

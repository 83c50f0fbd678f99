// Row 0 <- sum_r weights[part, r] row r, rounded once. Reads the rows whose weight is not 0, writes N bytes; weights
// (1, 0, .., 0) read and write nothing.
#include "ops.h"
#include "rows.h"

namespace gradproj::cpu {
namespace {

// Of a column: the rows that have to be read, and their weights.
struct Terms {
  std::vector<int> rows;
  std::vector<double> weights;

  void take(const RowView* views, const double* w, int num_rows) {
    rows.clear();
    weights.clear();
    for (int r = 0; r < num_rows; ++r)
      if (w[r] != 0.0 && views[r].data) {
        rows.push_back(r);
        weights.push_back(w[r]);
      }
  }
  bool leave_row_0() const { return rows.size() == 1 && rows[0] == 0 && weights[0] == 1.0; }
};

template <typename T>
void combine_task(const Plan& plan, const Chunks& chunks, int64_t task, const double* weights) {
  Terms terms;
  std::vector<const void*> rows;
  TileReader<T> reader(plan);
  chunks.each_slice(chunks.begin(task), chunks.end(task), [&](const Slice& s) {
    const RowView* views = plan.row_views(s.segment);
    terms.take(views, weights + int64_t{plan.segments[s.segment].part} * plan.rows, plan.rows);
    if (terms.leave_row_0()) return;
    const int count = static_cast<int>(terms.rows.size());
    if (const RowKernels* kernels = in_place(plan, s, terms.rows, rows)) {
      char* out = const_cast<char*>(views[0].data) + s.start * element_size(views[0].dtype);
      kernels->combine(out, rows.data(), terms.weights.data(), count, s.n);
      return;
    }
    rows.resize(terms.rows.size());
    for (int64_t done = 0; done < s.n; done += kTile) {
      const int64_t n = std::min<int64_t>(kTile, s.n - done);
      for (size_t i = 0; i < rows.size(); ++i) rows[i] = reader.read(s.segment, terms.rows[i], s.start + done, n);
      T* out = reader.buffer(0);
      reader.kernels_of_t().combine(out, rows.data(), terms.weights.data(), count, n);
      reader.write(s.segment, out, s.start + done, n);
    }
  });
}

bool all_leave_row_0(const Plan& plan, const double* weights) {
  for (int64_t i = 0; i < int64_t{plan.parts} * plan.rows; ++i)
    if (weights[i] != (i % plan.rows == 0 ? 1.0 : 0.0)) return false;
  return true;
}

}  // namespace

// Walks backwards: the tail of what a Gram pass has read is still in cache.
void combine(const Plan& plan, const double* weights) {
  if (all_leave_row_0(plan, weights)) return;
  const Chunks chunks(plan, 0);
  parallel(chunks.tasks(), [&](int64_t i) {
    const int64_t task = chunks.tasks() - 1 - i;
    plan.any_f64 ? combine_task<double>(plan, chunks, task, weights) : combine_task<float>(plan, chunks, task, weights);
  });
}

namespace {

void combine_op(StableListHandle grads, StableListHandle directions, Tensor weights, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {parts, num_parts});
  const Plan plan = plan_to_write(rows);
  combine(plan, elements(weights, int64_t{plan.parts} * plan.rows, "weights"));
}

}  // namespace
}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("combine_", TORCH_BOX(&gradproj::cpu::combine_op)); }

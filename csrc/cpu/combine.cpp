// Row 0 <- sum_r weights[part, r] row r, rounded once. Reads the rows whose weight is not 0, writes N bytes; weights
// (1, 0, .., 0) read and write nothing.
#include "context.h"
#include "rows.h"

namespace gradproj::cpu {
namespace {

template <typename T>
void combine_task(const Plan& plan, const Chunks& chunks, int64_t task, const double* weights) {
  std::vector<int> read;  // the rows of a segment that have to be read, and their weights
  std::vector<double> weights_read;
  std::vector<const void*> rows;
  TileReader<T> reader(plan);
  chunks.each_slice(chunks.begin(task), chunks.end(task), [&](const Slice& s) {
    const RowView* views = plan.row_views(s.segment);
    const double* w = weights + int64_t{plan.segments[s.segment].part} * plan.rows;
    read.clear();
    weights_read.clear();
    for (int r = 0; r < plan.rows; ++r)
      if (w[r] != 0.0 && views[r].data) {
        read.push_back(r);
        weights_read.push_back(w[r]);
      }
    const int count = static_cast<int>(read.size());
    if (count == 1 && read[0] == 0 && w[0] == 1.0) return;
    rows.resize(count);
    const RowKernels* stored = plan.segments[s.segment].ndim == 0 ? stored_kernels(plan, s.segment, read) : nullptr;
    if (stored) {
      for (int i = 0; i < count; ++i) rows[i] = reader.stored(s.segment, read[i], s.start, s.n);
      char* out = const_cast<char*>(views[0].data) + s.start * element_size(views[0].dtype);
      return stored->combine(out, rows.data(), weights_read.data(), count, s.n);
    }
    for (int64_t done = 0; done < s.n; done += kTile) {
      const int64_t n = std::min<int64_t>(kTile, s.n - done);
      for (int i = 0; i < count; ++i) rows[i] = reader.read(s.segment, read[i], s.start + done, n);
      T* out = reader.buffer(0);
      reader.kernels_of_t().combine(out, rows.data(), weights_read.data(), count, n);
      reader.write(s.segment, out, s.start + done, n);
    }
  });
}

}  // namespace

// Walks backwards: the tail of what a Gram pass has read is still in cache.
void Context::combine(const Plan& plan, const double* weights) {
  const Chunks chunks(plan, 0);
  parallel(chunks.tasks(), [&](int64_t i) {
    const int64_t task = chunks.tasks() - 1 - i;
    plan.any_f64 ? combine_task<double>(plan, chunks, task, weights) : combine_task<float>(plan, chunks, task, weights);
  });
}

}  // namespace gradproj::cpu

// Inner products of the rows. Reads R N bytes once, writes R^2 numbers per part. Products are float32 (float64 if anything is),
// sums float64, in an order that the plan fixes: same buffers, same bits, for any number of threads.
#include "ops.h"
#include "rows.h"

namespace gradproj::cpu {
namespace {

// What every chunk has found for every part that it meets, at place chunk + part. No two share one: chunks and parts both ascend
// along the plan, so of two neighbouring combinations at least one number is larger.
class ChunkSums {
 public:
  ChunkSums(const Plan& plan, const Chunks& chunks, int64_t pairs)
      : pairs_(pairs), sums_(static_cast<size_t>((chunks.count() + plan.parts) * pairs)), ranges_(static_cast<size_t>(plan.parts)) {
    for (size_t s = 0; s < plan.segments.size(); ++s) {
      Range& range = ranges_[static_cast<size_t>(plan.segments[s].part)];
      if (range.begin == range.end) range.begin = chunks.first_of(s);
      range.end = chunks.last_of(s) + 1;
    }
  }
  // Takes over the sums of all pairs, and leaves them zero.
  void take(int64_t chunk, int part, PairSum* sums) {
    double* totals = &sums_[static_cast<size_t>((chunk + part) * pairs_)];
    for (int64_t p = 0; p < pairs_; ++p) {
      for (double lane : sums[p].lanes) totals[p] += lane;
      sums[p] = {};
    }
  }
  double total(int part, int64_t pair) const {
    const Range& range = ranges_[static_cast<size_t>(part)];
    double total = 0.0;
    for (int64_t chunk = range.begin; chunk < range.end; ++chunk) total += sums_[static_cast<size_t>((chunk + part) * pairs_ + pair)];
    return total;
  }

 private:
  struct Range {
    int64_t begin = 0, end = 0;  // chunks that hold some of a part
  };
  int64_t pairs_;
  std::vector<double> sums_;
  std::vector<Range> ranges_;
};

// One chunk: its slices, each in place if there is a kernel that reads its rows, else through buffers.
template <typename T>
void gram_chunk(const Plan& plan, const Chunks& chunks, int64_t chunk, bool row_only, int64_t pairs, ChunkSums& found) {
  std::vector<PairSum> sums(static_cast<size_t>(2 * pairs));
  std::vector<int> all(static_cast<size_t>(plan.rows));
  std::iota(all.begin(), all.end(), 0);
  std::vector<const void*> rows;
  TileReader<T> reader(plan);
  int part = -1;
  for (Slice s = chunks.first(chunk); s.n > 0; s = chunks.next(s, chunk)) {
    if (plan.segments[s.segment].part != part) {
      if (part >= 0) found.take(chunk, part, sums.data());
      part = plan.segments[s.segment].part;
    }
    const RowKernels* kernels = in_place(plan, s, all, rows);
    if (kernels && (row_only || !kernels->mixed)) {
      kernels->gram(rows.data(), plan.rows, s.n, row_only, sums.data());
      continue;
    }
    rows.resize(all.size());
    for (int64_t done = 0; done < s.n; done += kTile) {
      const int64_t count = std::min<int64_t>(kTile, s.n - done);
      for (int r : all) rows[static_cast<size_t>(r)] = reader.read(s.segment, r, s.start + done, count);
      reader.kernels_of_t().gram(rows.data(), plan.rows, count, row_only, sums.data());
    }
  }
  found.take(chunk, part, sums.data());
}

}  // namespace

// gram: [parts, R, R], symmetric. gram_dd: [parts, R - 1, R - 1] products of rows 1.., or null; if given, only row 0 is computed.
void gram(const Plan& plan, const double* gram_dd, double* gram) {
  const int R = plan.rows;
  const bool row_only = gram_dd != nullptr;
  const int64_t pairs = row_only ? R : int64_t{R} * (R + 1) / 2;
  const Chunks chunks(plan, pairs * static_cast<int64_t>(sizeof(double)));
  ChunkSums found(plan, chunks, pairs);
  parallel(chunks.count(), [&](int64_t chunk) {
    if (plan.any_f64)
      gram_chunk<double>(plan, chunks, chunk, row_only, pairs, found);
    else
      gram_chunk<float>(plan, chunks, chunk, row_only, pairs, found);
  });
  for (int part = 0; part < plan.parts; ++part, gram += int64_t{R} * R, gram_dd += row_only ? int64_t{R - 1} * (R - 1) : 0)
    for (int i = 0; i < R; ++i)
      for (int j = i; j < R; ++j) {
        const bool given = row_only && i > 0;
        const int place = row_only ? j : pair_place(kernels().block, R, i, j);
        gram[i * R + j] = gram[j * R + i] = given ? gram_dd[(i - 1) * (R - 1) + j - 1] : found.total(part, place);
      }
}

namespace {

Tensor gram_op(StableListHandle list, int64_t num_rows, std::optional<Tensor> gram_dd, StableListHandle parts, int64_t num_parts) {
  const Rows rows(list, num_rows, {parts, num_parts});
  const Plan plan = make_plan(rows.buffers(), rows.layout());
  Tensor result = new_tensor(rows.shape(2));
  gram(plan, gram_dd_elements(gram_dd, plan), data(result));
  return result;
}

}  // namespace
}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("gram", TORCH_BOX(&gradproj::cpu::gram_op)); }

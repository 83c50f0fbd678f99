// Inner products of the rows. Reads R N bytes once, writes R^2 numbers per part. Products are float32 (float64 if
// anything is), sums float64.
//
// Order of summation of a pair: within a slice as gram_kernel.h says, slices ascending within a chunk, chunks as a
// binary tree over their number. Where chunks end depends on the sizes of the columns alone, and a tree lets any power
// of two of them be a task. So neither addresses, nor threads, nor the other rows change a bit of the product of two
// rows. One exception: in a column whose rows differ in dtype, 16-bit rows are multiplied in float32 tiles, in another
// order than among themselves.
#include "context.h"
#include "rows.h"

namespace gradproj::cpu {
namespace {

// Adds up lists of numbers in the order of a binary tree over their ascending indices; a missing index counts as zeros.
// 2^k aligned neighbours may be added up first, by a tree of their own.
class TreeSum {
 public:
  void add(int64_t index, std::vector<double> numbers) {
    size_t level = 0;
    for (; index >> level & 1; ++level)
      if (level < left_.size()) take(level, numbers);
    if (left_.size() <= level) left_.resize(level + 1);
    left_[level] = std::move(numbers);
  }
  // The sum; the tree is empty afterwards.
  std::vector<double> finish(int64_t count) {
    std::vector<double> sum(count);
    for (size_t level = 0; level < left_.size(); ++level) take(level, sum);
    return sum;
  }

 private:
  void take(size_t level, std::vector<double>& sum) {
    for (size_t i = 0; i < left_[level].size(); ++i) sum[i] = left_[level][i] + sum[i];
    left_[level].clear();
  }
  std::vector<std::vector<double>> left_;  // per level the left half of a sum that still lacks its right half
};

// What one task has of one part.
struct PartSums {
  int part;
  std::vector<double> pairs;
};

// Each slice in place if there is a kernel that reads its rows where they lie, else in tiles.
template <typename T>
std::vector<PartSums> gram_task(const Plan& plan, const Chunks& chunks, int64_t task, bool row_only, int64_t pairs) {
  std::vector<PairSum> sums(2 * pairs);
  std::vector<const void*> rows(plan.rows);
  TileReader<T> reader(plan);
  TreeSum tree;
  std::vector<PartSums> found;
  auto add_lanes = [&](int64_t chunk) {
    std::vector<double> totals(pairs);
    for (int64_t p = 0; p < pairs; ++p) {
      for (double lane : sums[p].lanes) totals[p] += lane;
      sums[p] = {};
    }
    tree.add(chunk - chunks.begin(task), std::move(totals));
  };
  int part = -1;
  for (int64_t chunk = chunks.begin(task); chunk < chunks.end(task); ++chunk) {
    chunks.each_slice(chunk, chunk + 1, [&](const Slice& s) {
      if (plan.segments[s.segment].part != part) {
        if (part >= 0) {
          add_lanes(chunk);
          found.push_back({part, tree.finish(pairs)});
        }
        part = plan.segments[s.segment].part;
      }
      if (row_only && !plan.row_views(s.segment)[0].data) return;
      const RowKernels* stored = stored_kernels(plan, s.segment, row_only);
      const bool whole = stored && all_in_memory(plan, s.segment);
      for (int64_t done = 0; done < s.n;) {
        const int64_t n = whole ? s.n : std::min<int64_t>(kTile, s.n - done);
        for (int r = 0; r < plan.rows; ++r)
          rows[r] = stored ? reader.stored(s.segment, r, s.start + done, n) : reader.read(s.segment, r, s.start + done, n);
        (stored ? *stored : reader.kernels_of_t()).gram(rows.data(), plan.rows, n, row_only, sums.data());
        done += n;
      }
    });
    add_lanes(chunk);
  }
  found.push_back({part, tree.finish(pairs)});
  return found;
}

}  // namespace

// gram: [parts, R, R], symmetric. gram_dd: [parts, R - 1, R - 1] products of rows 1.., or null; if given, only row 0 is
// computed.
void Context::gram(const Plan& plan, const double* gram_dd, double* gram) {
  const int R = plan.rows;
  const bool row_only = gram_dd != nullptr;
  const int64_t pairs = row_only ? R : int64_t{R} * (R + 1) / 2;
  const Chunks chunks(plan, pairs * sizeof(double));
  std::vector<std::vector<PartSums>> of_task(chunks.tasks());
  parallel(chunks.tasks(), [&](int64_t task) {
    of_task[task] = plan.any_f64 ? gram_task<double>(plan, chunks, task, row_only, pairs)
                                 : gram_task<float>(plan, chunks, task, row_only, pairs);
  });
  std::vector<TreeSum> of_part(plan.parts);
  for (int64_t task = 0; task < chunks.tasks(); ++task)
    for (PartSums& sums : of_task[task]) of_part[sums.part].add(task, std::move(sums.pairs));
  for (int64_t part = 0; part < plan.parts; ++part, gram += int64_t{R} * R) {
    const std::vector<double> sums = of_part[part].finish(pairs);
    const double* known = gram_dd + (row_only ? part * (R - 1) * (R - 1) : 0);
    for (int i = 0; i < R; ++i)
      for (int j = i; j < R; ++j) {
        const int place = row_only ? j : pair_place(kernels().block, R, i, j);
        gram[i * R + j] = gram[j * R + i] = row_only && i > 0 ? known[(i - 1) * (R - 1) + j - 1] : sums[place];
      }
  }
}

}  // namespace gradproj::cpu

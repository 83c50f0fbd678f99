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

// Adds up lists of `count` numbers in the order of a binary tree over their ascending indices; a missing one counts as
// zeros. 2^k aligned neighbours may be added up first, by a tree of their own.
class TreeSum {
 public:
  explicit TreeSum(int64_t count) : count_(count) {}

  void add(int64_t index, const double* numbers) {
    carry_.assign(numbers, numbers + count_);
    size_t level = 0;
    for (; index >> level & 1; ++level)
      if (level < left_.size()) take(level, carry_.data());
    if (left_.size() <= level) left_.resize(level + 1);
    left_[level].swap(carry_);
  }
  // Adds the whole to zeros at `sum`, and empties the tree.
  void finish(double* sum) {
    for (size_t level = 0; level < left_.size(); ++level) take(level, sum);
  }

 private:
  void take(size_t level, double* sum) {
    for (size_t i = 0; i < left_[level].size(); ++i) sum[i] = left_[level][i] + sum[i];
    left_[level].clear();
  }

  int64_t count_;
  std::vector<double> carry_;
  std::vector<std::vector<double>> left_;  // per level the left half of a sum that still lacks its right half
};

// What a task has of the parts that it meets, in their order.
struct TaskSums {
  std::vector<int> part;
  std::vector<double> sums;  // `pairs` per part
};

// Each slice in place if there is a kernel that reads its rows where they lie, else in tiles.
template <typename T>
TaskSums gram_task(const Plan& plan, const Chunks& chunks, int64_t task, bool row_only, int64_t pairs) {
  std::vector<PairSum> sums(2 * pairs);
  std::vector<const void*> rows(plan.rows);
  std::vector<int> all(plan.rows);
  std::iota(all.begin(), all.end(), 0);
  TileReader<T> reader(plan);
  std::vector<double> totals(pairs);
  TreeSum tree(pairs);
  TaskSums found;
  auto add_lanes = [&](int64_t chunk) {
    for (int64_t p = 0; p < pairs; ++p) {
      totals[p] = 0.0;
      for (double lane : sums[p].lanes) totals[p] += lane;
      sums[p] = {};
    }
    tree.add(chunk - chunks.begin(task), totals.data());
  };
  int part = -1;
  auto finish_part = [&] {
    found.part.push_back(part);
    found.sums.resize(found.sums.size() + pairs);
    tree.finish(found.sums.data() + found.sums.size() - pairs);
  };
  for (int64_t chunk = chunks.begin(task); chunk < chunks.end(task); ++chunk) {
    chunks.each_slice(chunk, chunk + 1, [&](const Slice& s) {
      if (plan.segments[s.segment].part != part) {
        if (part >= 0) {
          add_lanes(chunk);
          finish_part();
        }
        part = plan.segments[s.segment].part;
      }
      if (row_only && !plan.row_views(s.segment)[0].data) return;
      const RowKernels* stored = stored_kernels(plan, s.segment, all);
      if (stored && stored->mixed && !row_only) stored = nullptr;
      const bool whole = stored && all_in_memory(plan, s.segment);
      for (int64_t done = 0; done < s.n;) {
        const int64_t n = whole ? s.n : std::min<int64_t>(kTile, s.n - done);
        for (int r : all)
          rows[r] = stored ? reader.stored(s.segment, r, s.start + done, n)
                           : reader.read(s.segment, r, s.start + done, n);
        (stored ? *stored : reader.kernels_of_t()).gram(rows.data(), plan.rows, n, row_only, sums.data());
        done += n;
      }
    });
    add_lanes(chunk);
  }
  finish_part();
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
  std::vector<TaskSums> of_task(chunks.tasks());
  parallel(chunks.tasks(), [&](int64_t task) {
    of_task[task] = plan.any_f64 ? gram_task<double>(plan, chunks, task, row_only, pairs)
                                 : gram_task<float>(plan, chunks, task, row_only, pairs);
  });
  TreeSum tree(pairs);
  int64_t task = 0;  // parts ascend along the tasks, so one walk meets the sums of each part in a row
  size_t place = 0;
  for (int64_t part = 0; part < plan.parts; ++part, gram += int64_t{R} * R) {
    for (; task < chunks.tasks(); ++task, place = 0) {
      const TaskSums& found = of_task[task];
      if (found.part[place] == part) tree.add(task, &found.sums[place++ * pairs]);
      if (place < found.part.size()) break;  // the rest is of later parts
    }
    std::vector<double> sums(pairs);
    tree.finish(sums.data());
    const double* known = gram_dd + (row_only ? part * (R - 1) * (R - 1) : 0);
    for (int i = 0; i < R; ++i)
      for (int j = i; j < R; ++j) {
        const int pair = row_only ? j : pair_place(kernels().block, R, i, j);
        gram[i * R + j] = gram[j * R + i] = row_only && i > 0 ? known[(i - 1) * (R - 1) + j - 1] : sums[pair];
      }
  }
}

}  // namespace gradproj::cpu

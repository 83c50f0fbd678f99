// Inner products of the rows. Reads R N bytes once, writes R^2 numbers per part. Products are float32 (float64 if
// anything is), sums float64.
//
// Order of summation of a pair: within a slice as gram_kernel.h says, slices ascending within a chunk, chunks as a
// binary tree over their number. Where chunks end depends on the sizes of the columns alone, and a tree lets any power
// of two of them be a task. So neither addresses, nor threads, nor the other rows change a bit of the product of two
// rows. One exception: in a column whose rows differ in dtype, 16-bit rows are multiplied in float32 tiles, in another
// order than among themselves.
#include "ops.h"
#include "rows.h"

namespace gradproj::cpu {
namespace {

// Adds up lists of numbers in the order of a binary tree over their ascending indices; what is missing counts as zeros.
// 2^k aligned neighbours may be added up first, by a tree of their own.
class TreeSum {
 public:
  explicit TreeSum(int64_t width) : width_(static_cast<size_t>(width)) {}

  void add(int64_t index, const double* numbers) {
    carry_.assign(numbers, numbers + width_);
    size_t level = 0;
    for (; index >> level & 1; ++level)
      if (level < full_.size() && full_[level]) {
        add_level(level, carry_.data());
        full_[level] = false;
      }
    if (full_.size() <= level) {
      full_.resize(level + 1);
      left_.resize((level + 1) * width_);
    }
    std::copy(carry_.begin(), carry_.end(), left_.begin() + static_cast<int64_t>(level * width_));
    full_[level] = true;
  }
  // Writes the sum, and begins anew.
  void finish(double* sum) {
    std::fill_n(sum, width_, 0.0);
    for (size_t level = 0; level < full_.size(); ++level)
      if (full_[level]) add_level(level, sum);
    full_.clear();
  }

 private:
  void add_level(size_t level, double* sum) const {
    for (size_t i = 0; i < width_; ++i) sum[i] = left_[level * width_ + i] + sum[i];
  }

  size_t width_;
  std::vector<double> carry_, left_;  // left_: of every level the left half of a sum, while its right half is not there
  std::vector<bool> full_;            // which levels of it are in use
};

// The sums of every task for every part that it meets, at slot task + part. No two share one: tasks and parts both
// ascend along the plan, so of two neighbouring combinations at least one number is larger.
class TaskSums {
 public:
  TaskSums(const Plan& plan, const Chunks& chunks, int64_t pairs)
      : pairs_(pairs),
        sums_(static_cast<size_t>((chunks.tasks() + plan.parts) * pairs)),
        ranges_(static_cast<size_t>(plan.parts)),
        tree_(pairs) {
    for (size_t s = 0; s < plan.segments.size(); ++s) {
      Range& range = ranges_[static_cast<size_t>(plan.segments[s].part)];
      if (range.begin == range.end) range.begin = chunks.first_task_of(s);
      range.end = chunks.last_task_of(s) + 1;
    }
  }
  double* slot(int64_t task, int part) { return &sums_[static_cast<size_t>((task + part) * pairs_)]; }
  // Of all tasks.
  void totals(int part, double* sums) {
    const Range& range = ranges_[static_cast<size_t>(part)];
    for (int64_t task = range.begin; task < range.end; ++task) tree_.add(task, slot(task, part));
    tree_.finish(sums);
  }

 private:
  struct Range {
    int64_t begin = 0, end = 0;  // tasks that hold some of a part
  };
  int64_t pairs_;
  std::vector<double> sums_;
  std::vector<Range> ranges_;
  TreeSum tree_;
};

// One task: its slices, each in place if there is a kernel that reads its rows where they lie, else in tiles.
template <typename T>
void gram_task(const Plan& plan, const Chunks& chunks, int64_t task, bool row_only, int64_t pairs, TaskSums& found) {
  std::vector<PairSum> sums(static_cast<size_t>(2 * pairs));
  std::vector<double> totals(static_cast<size_t>(pairs));
  std::vector<const void*> rows(static_cast<size_t>(plan.rows));
  TileReader<T> reader(plan);
  TreeSum tree(pairs);
  auto add_lanes = [&](int64_t chunk) {
    for (size_t p = 0; p < totals.size(); ++p) {
      totals[p] = 0.0;
      for (double lane : sums[p].lanes) totals[p] += lane;
      sums[p] = {};
    }
    tree.add(chunk - chunks.begin(task), totals.data());
  };
  int part = -1;
  for (int64_t chunk = chunks.begin(task); chunk < chunks.end(task); ++chunk) {
    chunks.each_slice(chunk, chunk + 1, [&](const Slice& s) {
      if (plan.segments[s.segment].part != part) {
        if (part >= 0) {
          add_lanes(chunk);
          tree.finish(found.slot(task, part));
        }
        part = plan.segments[s.segment].part;
      }
      if (row_only && !plan.row_views(s.segment)[0].data) return;
      const RowKernels* stored = stored_kernels(plan, s.segment, row_only);
      const bool whole = stored && all_in_memory(plan, s.segment);
      for (int64_t done = 0; done < s.n;) {
        const int64_t n = whole ? s.n : std::min<int64_t>(kTile, s.n - done);
        for (int r = 0; r < plan.rows; ++r)
          rows[static_cast<size_t>(r)] =
              stored ? reader.stored(s.segment, r, s.start + done, n) : reader.read(s.segment, r, s.start + done, n);
        (stored ? *stored : reader.kernels_of_t()).gram(rows.data(), plan.rows, n, row_only, sums.data());
        done += n;
      }
    });
    add_lanes(chunk);
  }
  tree.finish(found.slot(task, part));
}

}  // namespace

// gram: [parts, R, R], symmetric. gram_dd: [parts, R - 1, R - 1] products of rows 1.., or null; if given, only row 0 is
// computed.
void gram(const Plan& plan, const double* gram_dd, double* gram) {
  const int R = plan.rows;
  const bool row_only = gram_dd != nullptr;
  const int64_t pairs = row_only ? R : int64_t{R} * (R + 1) / 2;
  const Chunks chunks(plan, pairs * static_cast<int64_t>(sizeof(double)));
  TaskSums found(plan, chunks, pairs);
  parallel(chunks.tasks(), [&](int64_t task) {
    if (plan.any_f64)
      gram_task<double>(plan, chunks, task, row_only, pairs, found);
    else
      gram_task<float>(plan, chunks, task, row_only, pairs, found);
  });
  std::vector<double> sums(static_cast<size_t>(pairs));
  for (int part = 0; part < plan.parts;
       ++part, gram += int64_t{R} * R, gram_dd += row_only ? int64_t{R - 1} * (R - 1) : 0) {
    found.totals(part, sums.data());
    for (int i = 0; i < R; ++i)
      for (int j = i; j < R; ++j) {
        const bool given = row_only && i > 0;
        const int place = row_only ? j : pair_place(kernels().block, R, i, j);
        gram[i * R + j] = gram[j * R + i] = given ? gram_dd[(i - 1) * (R - 1) + j - 1] : sums[static_cast<size_t>(place)];
      }
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

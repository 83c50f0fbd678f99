// The op combine_: row 0 <- a weighted sum of the rows.
#include "combine.h"

#include "arguments.h"
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

// Writes one chunk.
template <typename T>
class ChunkCombine {
 public:
  ChunkCombine(const Plan& plan, const Chunks& chunks, const double* weights)
      : plan_(plan), tile_(chunks.tile), weights_(weights), reader_(plan) {}

  // Elements start to start + n of a segment: where they lie if a kernel takes them so, else through tiles.
  void write(size_t segment, int64_t start, int64_t n) {
    take_part(plan_.segments[segment].part);
    if (unchanged_) return;
    in_place_.take(plan_, segment, used_, start, true);
    const RowView& row0 = plan_.row_views(segment)[0];
    if (in_place_.kernels) {
      char* out = const_cast<char*>(row0.data) + start * element_size(row0.dtype);
      return in_place_.kernels->combine(out, in_place_.rows.data(), scale_.data(), static_cast<int>(used_.size()), n);
    }
    for_each_tile(tile_, start, n, [&](int64_t at, int64_t count) { write_tile(segment, at, count); });
  }

 private:
  void take_part(int part) {
    if (part == part_) return;
    part_ = part;
    const double* w = weights_ + int64_t{part} * plan_.rows;
    used_ = used_rows(w, plan_.rows);
    unchanged_ = unchanged(w, used_);
    scale_.clear();
    for (int r : used_) scale_.push_back(w[r]);
  }

  void write_tile(size_t segment, int64_t at, int64_t count) {
    rows_.clear();
    present_.clear();
    for (size_t i = 0; i < used_.size(); ++i) {
      if (!plan_.row_views(segment)[used_[i]].data) continue;
      rows_.push_back(reader_.read(segment, used_[i], at, count));
      present_.push_back(scale_[i]);
    }
    T* out = reader_.buffer(0);
    tile_kernels<T>().combine(out, rows_.data(), present_.data(), static_cast<int>(rows_.size()), count);
    reader_.write(segment, out, at, count);
  }

  const Plan& plan_;
  const int64_t tile_;
  const double* weights_;
  int part_ = -1;
  bool unchanged_ = false;
  std::vector<int> used_;
  std::vector<double> scale_, present_;
  std::vector<const void*> rows_;
  InPlace in_place_;
  TileReader<T> reader_;
};

template <typename T>
void combine_typed(const Plan& plan, const double* weights) {
  bool nothing = true;
  for (int p = 0; p < plan.parts && nothing; ++p) {
    const double* w = weights + int64_t{p} * plan.rows;
    nothing = unchanged(w, used_rows(w, plan.rows));
  }
  if (nothing) return;
  const Chunks chunks = make_chunks(plan, 0);
  for_each_chunk(chunks, true, [&](int64_t chunk) {
    ChunkCombine<T> rows(plan, chunks, weights);
    for_each_run_of_chunk(plan, chunks, chunk, [&](size_t segment, int64_t start, int64_t n) { rows.write(segment, start, n); });
  });
}

void combine_op(StableListHandle grads, StableListHandle directions, Tensor weights, StableListHandle parts, int64_t num_parts) {
  const Rows rows(grads, directions, {parts, num_parts});
  const Plan plan = plan_to_write(rows);
  combine(plan, small(weights, int64_t{plan.parts} * plan.rows, "weights"));
}

}  // namespace

void combine(const Plan& plan, const double* weights) {
  plan.any_f64 ? combine_typed<double>(plan, weights) : combine_typed<float>(plan, weights);
}

}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("combine_", TORCH_BOX(&gradproj::cpu::combine_op)); }

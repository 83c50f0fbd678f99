// The op gram: inner products of rows.
#include "gram.h"

#include "arguments.h"
#include "walk.h"

namespace gradproj::cpu {
namespace {

// Sums of one chunk and one part have a slot of their own, number chunk + part: unique, because both ascend along the plan.
class Partials {
 public:
  Partials(const Plan& plan, const Chunks& chunks, int64_t pairs)
      : chunks_(chunks), pairs_(pairs), sums_(static_cast<size_t>((chunks.count + plan.parts) * pairs)) {
    range_.assign(static_cast<size_t>(plan.parts) * 2, 0);
    for (size_t s = plan.segments.size(); s-- > 0;) {
      int64_t* range = &range_[static_cast<size_t>(plan.segments[s].part) * 2];
      range[0] = chunks.starts[s];
      if (range[1] == 0) range[1] = chunks.starts[s + 1];
    }
  }
  double* slot(int64_t chunk, int part) { return &sums_[static_cast<size_t>((chunk + part) * pairs_)]; }
  double sum(int part, int64_t pair) {
    const int64_t begin = range_[static_cast<size_t>(part) * 2], end = range_[static_cast<size_t>(part) * 2 + 1];
    double total = 0.0;
    for (int64_t c = begin / chunks_.elements; begin < end && c <= (end - 1) / chunks_.elements; ++c) total += slot(c, part)[pair];
    return total;
  }

 private:
  const Chunks& chunks_;
  int64_t pairs_;
  std::vector<double> sums_;
  std::vector<int64_t> range_;  // of every part: first and past the last element
};

// The products of one chunk: of all pairs of rows, or of row 0 with each (only_first).
template <typename T>
class ChunkGram {
 public:
  ChunkGram(const Plan& plan, const Chunks& chunks, bool only_first, int64_t pairs)
      : plan_(plan), tile_(chunks.tile), only_first_(only_first), pairs_(static_cast<size_t>(pairs)), sums_(3 * pairs_), reader_(plan) {
    for (int r = 0; r < plan.rows; ++r) all_.push_back(r);
    rows_.resize(all_.size());
  }

  // Elements start to start + n of a segment: where they lie if a kernel takes them so, else through tiles.
  void add(size_t segment, int64_t start, int64_t n) {
    in_place_.take(plan_, segment, all_, start, only_first_);
    if (in_place_.kernels) return in_place_.kernels->gram(in_place_.rows.data(), plan_.rows, n, only_first_, sums_.data());
    for_each_tile(tile_, start, n, [&](int64_t at, int64_t count) {
      for (int r : all_) rows_[static_cast<size_t>(r)] = reader_.read(segment, r, at, count);
      tile_kernels<T>().gram(rows_.data(), plan_.rows, count, only_first_, sums_.data());
    });
  }

  // The sums so far into a slot; the next begin anew.
  void finish(double* slot) {
    for (size_t p = 0; p < pairs_; ++p) {
      slot[p] = 0.0;
      for (double lane : sums_[p].lanes) slot[p] += lane;
    }
    std::fill(sums_.begin(), sums_.end(), PairSum{});
  }

 private:
  const Plan& plan_;
  const int64_t tile_;
  const bool only_first_;
  const size_t pairs_;
  std::vector<PairSum> sums_;  // and twice as many of scratch
  std::vector<int> all_;
  std::vector<const void*> rows_;
  InPlace in_place_;
  TileReader<T> reader_;
};

template <typename T>
void gram_typed(const Plan& plan, const double* gram_dd, double* gram) {
  const int R = plan.rows;
  const bool only_first = gram_dd != nullptr;
  const int64_t pairs = only_first ? R : int64_t{R} * (R + 1) / 2;
  const Chunks chunks = make_chunks(plan, pairs * 8);
  Partials partials(plan, chunks, pairs);

  for_each_chunk(chunks, false, [&](int64_t chunk) {
    ChunkGram<T> sums(plan, chunks, only_first, pairs);
    int part = -1;
    for_each_run_of_chunk(plan, chunks, chunk, [&](size_t segment, int64_t start, int64_t n) {
      if (part >= 0 && plan.segments[segment].part != part) sums.finish(partials.slot(chunk, part));
      part = plan.segments[segment].part;
      sums.add(segment, start, n);
    });
    if (part >= 0) sums.finish(partials.slot(chunk, part));
  });

  for (int part = 0; part < plan.parts; ++part, gram += int64_t{R} * R) {
    int64_t pair = 0;
    for (int i = 0; i < R; ++i)
      for (int j = i; j < R; ++j, ++pair)
        gram[i * R + j] = gram[j * R + i] =
            only_first && i > 0 ? gram_dd[(int64_t{part} * (R - 1) + i - 1) * (R - 1) + j - 1] : partials.sum(part, pair);
  }
}

Tensor gram_op(StableListHandle list, int64_t num_rows, std::optional<Tensor> gram_dd, StableListHandle parts, int64_t num_parts) {
  const Rows rows(list, num_rows, {parts, num_parts});
  Tensor result = new_tensor(rows.shape(2));
  gram(make_plan(rows.buffers(), rows.layout()), small_gram_dd(gram_dd, rows.layout()), data(result));
  return result;
}

}  // namespace

void gram(const Plan& plan, const double* gram_dd, double* gram) {
  plan.any_f64 ? gram_typed<double>(plan, gram_dd, gram) : gram_typed<float>(plan, gram_dd, gram);
}

}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("gram", TORCH_BOX(&gradproj::cpu::gram_op)); }

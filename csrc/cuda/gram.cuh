// The Gram of up to nine rows in one pass, of more in several: every block leaves float64 sums of its products in
// slots, a second kernel adds the slots up.
#pragma once

#include "batches.h"
#include "slots.cuh"

namespace gradproj::cuda {

constexpr int kPassRows = 9;

// Sums that a lane keeps: products of kRows rows in C, added to totals in double after every chunk. Pair (i, j), i <=
// j, is number j (j + 1) / 2 + i, so the pairs of fewer rows come first. kRowOnly: pair (0, j) only, number j.
// At most 48 products are added up in float32: of equal elements every addition may round the same way, 8e-7 in all.
template <typename C, int kRows, bool kRowOnly>
struct Sums {
  static constexpr int kPairs = kRowOnly ? kRows : kRows * (kRows + 1) / 2;
  C product[kPairs] = {};
  double total[kPairs] = {};

  __device__ void add(const C (&column)[kRows]) {
    int p = 0;
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int i = 0; i <= (kRowOnly ? 0 : j); ++i, ++p) {
        if constexpr (sizeof(C) == sizeof(double))
          total[p] += column[i] * column[j];
        else
          product[p] += column[i] * column[j];
      }
  }
  __device__ void widen_products() {
    if constexpr (sizeof(C) < sizeof(double))
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        total[p] += static_cast<double>(product[p]);
        product[p] = C(0);
      }
  }
};

// The rows of a chunk, and how their products come into the sums.
template <typename G, typename D, int kRows>
class ChunkRows {
 public:
  static constexpr int kCount = 16 / static_cast<int>(sizeof(G));  // elements of a row that a lane takes at a time
  static constexpr int kStep = 32 * kCount;
  using C = Compute<G>;

  __device__ ChunkRows(const Segments& p, int s, const Chunk& chunk) {
    const char* const* address = p.address + s * p.rows;
    row0_ = row_at<G>(address[0], chunk);
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) rows_[r] = r + 1 < p.rows ? row_at<D>(address[r + 1], chunk) : nullptr;
  }
  __device__ bool all_present() const {
    bool all = row0_ != nullptr;
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) all = all && rows_[r];
    return all;
  }
  // Whether all rows can be loaded 16 bytes at a time from positions that are multiples of kCount. Row 0 always can.
  __device__ bool all_aligned() const {
    bool all = true;
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) all = all && aligned<kCount>(rows_[r]);
    return all;
  }
  // Positions [first, last), one to a lane.
  template <typename S>
  __device__ void add_elements(S& sums, int first, int last) const {
#pragma unroll(kRows == 2 ? 4 : 1)
    for (int i = first / 32 * 32 + static_cast<int>(threadIdx.x) % 32; i < last; i += 32) {
      C column[kRows];
      column[0] = row0_ && i >= first ? widen(row0_[i]) : C(0);
#pragma unroll
      for (int r = 0; r < kRows - 1; ++r) column[r + 1] = rows_[r] && i >= first ? widen(rows_[r][i]) : C(0);
      sums.add(column);
    }
  }
  // Whole steps from position `first` on, as many as fit before `last`; returns where they end. All loads of
  // kUnroll steps are issued before the first product.
  template <int kUnroll, bool kAllPresent, typename S>
  __device__ int add_steps(S& sums, int first, int last) const {
    for (; first + kUnroll * kStep <= last; first += kUnroll * kStep) {
      const int i = first + static_cast<int>(threadIdx.x) % 32 * kCount;
      Pack<G, kCount> row0[kUnroll] = {};
      Pack<D, kCount> rows[kUnroll][kRows - 1] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (kAllPresent || row0_) row0[u] = load<kCount>(row0_ + i + u * kStep);
#pragma unroll
        for (int r = 0; r < kRows - 1; ++r)
          if (kAllPresent || rows_[r]) rows[u][r] = load<kCount>(rows_[r] + i + u * kStep);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) add_packs(sums, row0[u], rows[u]);
    }
    return first;
  }

 private:
  template <typename S>
  __device__ static void add_packs(S& sums, const Pack<G, kCount>& row0, const Pack<D, kCount> (&rows)[kRows - 1]) {
#pragma unroll
    for (int e = 0; e < kCount / 2; ++e) {
      const auto pair0 = widen(row0.pair(e));
      C x[kRows] = {pair0.x}, y[kRows] = {pair0.y};
#pragma unroll
      for (int r = 0; r < kRows - 1; ++r) {
        const auto pair = widen(rows[r].pair(e));
        x[r + 1] = pair.x;
        y[r + 1] = pair.y;
      }
      sums.add(x);
      sums.add(y);
    }
  }

  const G* row0_;
  const D* rows_[kRows - 1];
};

// Resident blocks per multiprocessor, which is the register budget: half occupancy where two rows are streamed.
template <typename G>
constexpr int gram_blocks(int rows, bool row_only) {
  if (rows == 2) return sizeof(G) == 8 ? 3 : 4;
  return rows <= 5 || row_only ? 2 : 1;
}

// Products of the rows of dense segments, at most kRows of them. Reads each element of each row once: 16 bytes of row 0
// and as many elements of the others per lane; one element per lane in heads, tails, and chunks whose rows are not all
// aligned as row 0 is. Writes a slot, kPairs doubles, per block and part that it meets.
// Order of summation: a lane its own elements, ascending; the lanes of a warp; the warps of a block; the slots.
template <typename G, typename D, int kRows, bool kRowOnly>
__global__ __launch_bounds__(kThreads, gram_blocks<G>(kRows, kRowOnly))
void gram_dense(const __grid_constant__ Segments p, Slots slots) {
  using Rows = ChunkRows<G, D, kRows>;
  let_next_kernel_start();
  int first = static_cast<int>(blockIdx.x) * p.per_block;
  const int last = min(first + p.per_block, p.chunks());
  int s = p.segment_of(first);
  while (first < last) {  // one part at a time
    const int32_t part = p.part[s];
    int next = s + 1;  // the first segment of another part, or of another block only
    while (p.end[next - 1] < last && p.part[next] == part) ++next;
    const int end = min(p.end[next - 1], last);
    Sums<Compute<G>, kRows, kRowOnly> sums;
    for (int c = first + static_cast<int>(threadIdx.x) / 32; c < end; c += kWarps) {
      while (p.end[s] <= c) ++s;
      const Chunk chunk = chunk_of<G>(p, s, c);
      const Rows rows(p, s, chunk);
      int at = chunk.to;
      if (rows.all_aligned()) at = min(at, (chunk.from + Rows::kCount - 1) / Rows::kCount * Rows::kCount);
      rows.add_elements(sums, chunk.from, at);
      if (kRows == 2 && rows.all_present()) at = rows.template add_steps<2, true>(sums, at, chunk.to);
      at = rows.template add_steps<1, false>(sums, at, chunk.to);
      rows.add_elements(sums, at, chunk.to);
      sums.widen_products();
    }
    write_slot(slots, int64_t{blockIdx.x} + part, sums.total);
    first = end;
    s = next;
  }
}

// The same for one strided segment, an element per lane, in double. A slot per block.
template <int kRows, bool kRowOnly>
__global__ __launch_bounds__(kThreads, 1) void gram_strided(const __grid_constant__ StridedSegment p, Slots slots) {
  Sums<double, kRows, kRowOnly> sums;
  let_next_kernel_start();
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numel; i += int64_t{gridDim.x} * kThreads) {
    const Element element(p, i);
    double column[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) column[r] = r < p.rows && p.address[r] ? element.load(r) : 0.0;
    sums.add(column);
  }
  write_slot(slots, blockIdx.x, sums.total);
}

// Where sums go.
struct Target {
  double* gram;           // [parts, R, R]
  const double* gram_dd;  // [parts, R - 1, R - 1], copied into rows and columns 1.. of the Gram; null: nothing is
  int32_t R;
  bool add;  // to what is there
};

// Adds up slots first, first + 1, .. into one part of the Gram, with a whole block. Reads count * pairs doubles.
__device__ inline void add_up(const Slots& slots, int64_t first, int32_t count, const Pass& pass, const Target& target,
                              int64_t part) {
  const int R = target.R, K = R - 1;
  double* gram = target.gram + part * R * R;
  for (int p = static_cast<int>(threadIdx.x) / 32; p < slots.pairs; p += kWarps) {
    int i = p, j = 0;
    if (pass.needs_first)
      i = 0, j = p;
    else
      while (i > j) i -= ++j;
    double sum = sum_slots(slots.sums + first * slots.pairs, count, slots.pairs, p);
    if (threadIdx.x % 32 != 0) continue;
    double& value = gram[pass.row(i) * R + pass.row(j)];
    if (target.add) sum += value;
    value = gram[pass.row(j) * R + pass.row(i)] = sum;
  }
  if (target.gram_dd)
    for (int k = static_cast<int>(threadIdx.x); k < K * K; k += kThreads)
      gram[(k / K + 1) * R + k % K + 1] = target.gram_dd[part * K * K + k];
}

// Slots 0..count-1 into each of parts `part`, `part` + 1, .., a block for each.
__global__ __launch_bounds__(kThreads)
void gram_finish(Slots slots, int32_t count, Pass pass, Target target, int32_t part) {
  add_up(slots, 0, count, pass, target, int64_t{part} + blockIdx.x);
}

// The slots of a launch over several parts, a block for each part from that of the first segment on.
__global__ __launch_bounds__(kThreads)
void gram_finish_parts(const __grid_constant__ Segments p, Slots slots, Pass pass, Target target) {
  const int32_t part = p.part[0] + static_cast<int32_t>(blockIdx.x);
  const int s = p.first_of_part(part), next = p.first_of_part(part + 1);
  if (s == next) return;  // the launch has nothing of this part
  const int32_t first = p.begin(s) / p.per_block, last = (p.begin(next) - 1) / p.per_block;
  add_up(slots, int64_t{first} + part, last - first + 1, pass, target, part);
}

}  // namespace gradproj::cuda

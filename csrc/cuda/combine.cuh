// Row 0 <- sum_r weights[r] row r, and, for K = 1, the weights themselves before that.
#pragma once

#include "batches.h"
#include "slots.cuh"

namespace gradproj::cuda {

// The weights of part 0. solved: of the block's shared memory. By every thread of the block.
__device__ inline const double* find_weights(const WeightSource& source, double (&solved)[2]) {
  __shared__ double products[3];
  if (source.count == 0) return source.weights;
  for (int p = static_cast<int>(threadIdx.x) / 32; p < 3; p += kWarps) {
    const double sum = sum_slots(source.slots, source.count, 3, p);
    if (threadIdx.x % 32 == 0) products[p] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    solve_weights_k1(source.rule, products[0], products[1], products[2], solved);
    if (blockIdx.x == 0) {
      source.weights[0] = solved[0];
      source.weights[1] = solved[1];
      source.gram[0] = products[0];
      source.gram[1] = source.gram[2] = products[1];
      source.gram[3] = products[2];
    }
  }
  __syncthreads();
  return solved;
}

// A row after row 0 that has to be read: it is there, and its weight is not 0.
template <typename C, typename D>
struct WeightedRow {
  const D* row;
  C weight;
};

// A warp at one segment. All rows of an element are loaded before it is stored: a direction may be the gradient itself.
template <typename G, typename D>
class Combine {
 public:
  static constexpr int kCount = 16 / static_cast<int>(sizeof(G));  // elements of a row that a lane takes at a time
  static constexpr int kStep = 32 * kCount;
  using C = Compute<G>;
  using List = WeightedRow<C, D>[kMaxRows - 1];

  // list: the warp's own, in shared memory.
  __device__ explicit Combine(List& list) : list_(list), lane_(static_cast<int>(threadIdx.x) % 32) {}

  // Turns to segment s. weights: of its part.
  __device__ void begin(const Segments& p, int s, const double* weights) {
    const char* const* address = p.address + s * p.rows;
    const int lead = lead_of(address[0], sizeof(G));
    row0_ = reinterpret_cast<G*>(const_cast<char*>(address[0]));
    weight0_ = static_cast<C>(weights[0]);
    count_ = 0;
    bool all_aligned = true;
    __syncwarp();  // all lanes are done with the list
    for (int first = 1; first < p.rows; first += 32) {
      const int r = first + lane_;
      const double weight = r < p.rows && address[r] ? weights[r] : 0.0;
      const unsigned read = __ballot_sync(0xffffffffu, weight != 0.0);
      if (weight != 0.0) {
        const D* row = reinterpret_cast<const D*>(address[r]);
        all_aligned = all_aligned && aligned<kCount>(row - lead);
        list_[count_ + __popc(read & ((1u << lane_) - 1))] = {row, static_cast<C>(weight)};
      }
      count_ += __popc(read);
    }
    all_aligned_ = __all_sync(0xffffffffu, all_aligned);
    __syncwarp();  // the list is written
  }

  // Whether the segment stays as it is, unread.
  __device__ bool unchanged() const { return count_ == 0 && weight0_ == C(1); }

  __device__ void run(const Chunk& chunk) const {
    int at = chunk.to;
    if (all_aligned_) at = min(at, (chunk.from + kCount - 1) / kCount * kCount);
    elements(chunk.start, chunk.from, at);
    if (count_ == 1 && weight0_ != C(0)) at = two_rows(chunk.start, at, chunk.to);
#pragma unroll 1
    for (; at + kStep <= chunk.to; at += kStep) step(chunk.start + at + lane_ * kCount);
    elements(chunk.start, at, chunk.to);
  }

 private:
  // Pointers out of shared memory are not known to be global ones, whose loads are cheaper.
  __device__ const D* row(int k) const {
    const D* const row = list_[k].row;
    __builtin_assume(__isGlobal(row));
    return row;
  }

  // Positions [first, last) of a chunk, four to a lane at a time.
  __device__ void elements(int64_t start, int first, int last) const {
    constexpr int kUnroll = 4;
    for (int at = first / 32 * 32 + lane_; at < last; at += 32 * kUnroll) {
      C total[kUnroll] = {};
      auto inside = [&](int u) { return at + 32 * u >= first && at + 32 * u < last; };
      for (int k = 0; k < count_; ++k) add_elements(total, list_[k].weight, row(k) + start + at, inside);
      if (weight0_ != C(0)) add_elements(total, weight0_, row0_ + start + at, inside);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (inside(u)) narrow(total[u], row0_[start + at + 32 * u]);
    }
  }
  template <int kUnroll, typename T, typename Inside>
  __device__ static void add_elements(C (&total)[kUnroll], C weight, const T* row, const Inside& inside) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (inside(u)) total[u] += weight * widen(row[32 * u]);
  }

  // Whole steps of row 0 and one other, four loads in flight, from position `at` of a chunk on; returns where they end.
  __device__ int two_rows(int64_t start, int at, int to) const {
    constexpr int kUnroll = 2;
    const D* const d = row(0) + start + lane_ * kCount;
    G* const g = row0_ + start + lane_ * kCount;
    const C w0 = weight0_, w1 = list_[0].weight;
    for (; at + kUnroll * kStep <= to; at += kUnroll * kStep) {
      Pack<G, kCount> x[kUnroll];
      Pack<D, kCount> y[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        x[u] = load<kCount>(g + at + u * kStep);
        y[u] = load<kCount>(d + at + u * kStep);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        C total[kCount] = {};
        add(total, w1, y[u]);
        add(total, w0, x[u]);
        put(g + at + u * kStep, total);
      }
    }
    return at;
  }

  // One step at element i, any number of rows: four of them, and row 0, are loaded before the first is waited for.
  __device__ void step(int64_t i) const {
    Pack<G, kCount> row0 = {};
    if (weight0_ != C(0)) row0 = load<kCount>(row0_ + i);
    C total[kCount] = {};
    int k = 0;
#pragma unroll 1
    for (; k + 4 <= count_; k += 4) add_rows<4>(total, k, i);
    switch (count_ - k) {
      case 3: add_rows<3>(total, k, i); break;
      case 2: add_rows<2>(total, k, i); break;
      case 1: add_rows<1>(total, k, i); break;
    }
    if (weight0_ != C(0)) add(total, weight0_, row0);
    put(row0_ + i, total);
  }
  template <int kRows>
  __device__ void add_rows(C (&total)[kCount], int k, int64_t i) const {
    Pack<D, kCount> pack[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) pack[j] = load<kCount>(row(k + j) + i);
#pragma unroll
    for (int j = 0; j < kRows; ++j) add(total, list_[k + j].weight, pack[j]);
  }

  template <typename T>
  __device__ static void add(C (&total)[kCount], C weight, const Pack<T, kCount>& pack) {
#pragma unroll
    for (int e = 0; e < kCount / 2; ++e) {
      const auto pair = widen(pack.pair(e));
      total[2 * e] += weight * pair.x;
      total[2 * e + 1] += weight * pair.y;
    }
  }
  __device__ static void put(G* row, const C (&total)[kCount]) {
    Pack<G, kCount> pack;
#pragma unroll
    for (int e = 0; e < kCount / 2; ++e) {
      typename Pack<G, kCount>::Pair pair;
      narrow({total[2 * e], total[2 * e + 1]}, pair);
      pack.set_pair(e, pair);
    }
    store<kCount>(row, pack);
  }

  List& list_;
  const int lane_;
  G* row0_;
  C weight0_;
  int count_;
  bool all_aligned_;
};

// Resident blocks per multiprocessor, which is the register budget: half occupancy, but for doubles.
template <typename G>
constexpr int kCombineBlocks = sizeof(G) == 8 ? 3 : 4;

// Row 0 of dense segments. Reads each row whose weight is not 0 once and writes row 0 once: 16 bytes of row 0 and as
// many elements of the others per lane; one element per lane in heads, tails, and segments whose rows are not all
// aligned as row 0 is. Walks backwards over the chunks that the same block of a Gram pass took: what was read last is
// still in L2.
// Order of summation: rows 1, 2, .., then row 0.
template <typename G, typename D>
__global__ __launch_bounds__(kThreads, kCombineBlocks<G>)
void combine_dense(const __grid_constant__ Segments p, WeightSource source) {
  __shared__ double solved[2];
  __shared__ typename Combine<G, D>::List lists[kWarps];
  wait_for_last_kernel();
  const double* weights = find_weights(source, solved);
  const int warp = static_cast<int>(threadIdx.x) / 32, first = static_cast<int>(blockIdx.x) * p.per_block;
  Combine<G, D> combine(lists[warp]);
  int s = p.count;  // the segment that `combine` is at
  for (int c = min(first + p.per_block, p.chunks()) - 1 - warp; c >= first; c -= kWarps) {
    if (s == p.count || p.begin(s) > c) {
      s = p.segment_of(c);
      combine.begin(p, s, weights + int64_t{p.part[s]} * p.rows);
    }
    if (!combine.unchanged()) combine.run(chunk_of<G>(p, s, c));
  }
}

// The same for one strided segment, an element per thread, in double.
__global__ __launch_bounds__(kThreads, 4)
void combine_strided(const __grid_constant__ StridedSegment p, WeightSource source) {
  __shared__ double solved[2];
  wait_for_last_kernel();
  const double* weights = find_weights(source, solved) + int64_t{p.part} * p.rows;
  bool unchanged = weights[0] == 1.0;
  for (int r = 1; r < p.rows; ++r) unchanged = unchanged && (!p.address[r] || weights[r] == 0.0);
  if (unchanged) return;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numel; i += int64_t{gridDim.x} * kThreads) {
    const Element element(p, i);
    double total = 0.0;
    for (int r = 1; r < p.rows; ++r)
      if (p.address[r] && weights[r] != 0.0) total += weights[r] * element.load(r);
    if (weights[0] != 0.0) total += weights[0] * element.load(0);
    element.store(total);
  }
}

}  // namespace gradproj::cuda

// Row 0 <- sum_r weights[r] row r, and, fused in front of it at K = 1, the weights themselves.
#pragma once

#include "../weights.h"
#include "gram.cuh"

namespace gradproj::cuda {

// Where a combine kernel finds its weights. slots == 0: in `weights` [parts, R]. Otherwise K = 1, there is one part, and a
// Gram pass has just left its partial sums: every block adds them up for itself (a few thousand doubles out of L2) and applies
// the rule, so nothing has to run between the two passes over the gradients; block 0 also writes the results down.
struct WeightSource {
  double* weights;
  const double* partial;
  double* gram;
  Rule rule;
  int32_t slots;
  int32_t R;
};
static_assert(sizeof(WeightSource) <= 64, "what Segments leaves of the kernel parameters");

constexpr int kMostLoads = 4;  // rows of a group

// The rows that have to be read, and their weights.
template <typename C>
struct Used {
  C weight[kMaxRows];
  int row[kMaxRows];  // index within the launch
  int count;
  int size, larger;  // rows of a group, and how many groups have one more: all are loaded before the first is waited for
  bool unchanged;  // weights (1, 0, .., 0): nothing is read or written
};

// By one warp, all lanes.
template <typename C>
__device__ inline void find_used(Used<C>& used, const double* weights, const RowInfo& info, int rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int count = 0;
  bool unchanged = true;
  for (int first = 0; first < rows; first += 32) {
    const int r = first + lane;
    const double w = r < rows ? weights[info.id[r]] : 0.0;
    const unsigned read = __ballot_sync(0xffffffffu, w != 0.0);
    const double same = r < rows && info.id[r] == 0 ? 1.0 : 0.0;
    unchanged = __ballot_sync(0xffffffffu, w != same) == 0 && unchanged;
    if (w != 0.0) {
      const int at = count + __popc(read & ((1u << lane) - 1));
      used.row[at] = r;
      used.weight[at] = static_cast<C>(w);
    }
    count += __popc(read);
  }
  if (lane == 0) {
    const int groups = (count + kMostLoads - 1) / kMostLoads;
    used.count = count;
    used.size = groups ? count / groups : 0;
    used.larger = count - used.size * groups;
    used.unchanged = unchanged;
  }
}

// Of a launch whose pieces all belong to one part: by every thread of the block.
template <typename C>
__device__ inline void find_used(Used<C>& used, const WeightSource& source, int32_t part, const RowInfo& info, int rows) {
  __shared__ double products[3], solved[2];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (source.slots > 0) {
    for (int p = warp; p < 3; p += kWarps) {
      const double sum = sum_slots(source.partial, source.slots, 3, p, lane);
      if (lane == 0) products[p] = sum;
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
  }
  if (warp == 0) find_used(used, source.slots > 0 ? solved : source.weights + int64_t{part} * source.R, info, rows);
  __syncthreads();
}

// Reads the rows whose weight is not 0 once, and the base, and writes row 0 once, in accesses of 16 bytes but for the head and
// tail of a segment and rows that are not aligned as row 0 is. Walks backwards: what a Gram pass read last is still in L2. All
// rows of an element are loaded before it is stored.
template <typename C, typename Access, int kBytes>
__global__ __launch_bounds__(kThreads, Access::kMixed ? 2 : 4) void combine_dense(const __grid_constant__ Segments<kBytes> p, WeightSource source) {
  constexpr int kCount = Access::kCount;
  constexpr int kUnroll = Access::kMixed || kCount == 8 ? 2 : 4;
  constexpr int kStep = 32 * kCount;
  using Rows = RunRows<C, Access, Segments<kBytes>>;
  using Part = typename Rows::Part;
  __shared__ Used<C> of_warp[Access::kMixed ? kWarps : 1];  // with several parts, each warp is in one of its own
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool several = Access::kMixed && p.parts;
  Used<C>& used = of_warp[several ? warp : 0];
  if (!several) {
    find_used(used, source, 0, p.info, p.rows);
    if (used.unchanged) return;
  }
  const bool from_base = Access::kMixed && p.base > 0;
  const uint32_t granules = p.end(p.count - 1), chunks = (granules + p.chunk - 1) / p.chunk;
  const int row0_bytes = Access::element_bytes(p.info.dtype[0]);
  int32_t part_used = -1;

  for (uint32_t c = blockIdx.x * kWarps + warp; c < chunks; c += gridDim.x * kWarps) {
    const uint32_t first = (chunks - 1 - c) * p.chunk;
    const uint32_t last = granules - first < p.chunk ? granules : first + p.chunk;
    for_each_run(p, row0_bytes, first, last, [&](const Run& run) {
      if (several && p.part(run.segment) != part_used) {
        part_used = p.part(run.segment);
        __syncwarp();  // until all lanes are done with the part before
        find_used(used, source.weights + int64_t{part_used} * source.R, p.info, p.rows);
        __syncwarp();
      }
      if (several && used.unchanged) return;
      const Rows rows(p, run);
      auto add = [&](C (&total)[kCount], C weight, const C (&v)[kCount]) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) total[e] += weight * v[e];
      };
      auto subtract_from = [&](int i, const Part& base, C (&v)[kCount]) {
        C b[kCount];
        rows.values(p.base, i, base, b);
#pragma unroll
        for (int e = 0; e < kCount; ++e) v[e] = b[e] - v[e];
      };
      int at = 0;
      auto some = [&](int stop) {  // any number of rows, any alignment, heads and tails
        for (; at < stop; at += kStep) {
          const int i = at + lane * kCount;
          const int from = i < run.pad ? (run.pad - i < kCount ? run.pad - i : kCount) : 0;
          const int to = i + kCount <= run.end ? kCount : i < run.end ? run.end - i : 0;
          if (from >= to) continue;
          Part base{};
          if (from_base) base = rows.load_some(p.base, i, from, to);
          C total[kCount] = {};
          for (int k = 0; k < used.count; ++k) {
            const int r = used.row[k];
            const Part part = rows.load_some(r, i, from, to);
            C v[kCount];
            rows.values(r, i, part, v);
            if (from_base && r == 0) subtract_from(i, base, v);
            add(total, used.weight[k], v);
          }
          if (from_base) subtract_from(i, base, total);
          Access::template store<C>(rows.at(0, i), total, rows.dtype(0), from, to);
        }
      };
      bool good = rows.aligned(0) && (!from_base || rows.aligned(p.base));
      for (int k = lane; k < used.count; k += 32) good = good && rows.aligned(used.row[k]);
      const bool aligned = __ballot_sync(0xffffffffu, !good) == 0;
      if (run.pad > 0) some(kStep < run.end ? kStep : run.end);
      if (aligned && used.count == 2 && used.row[0] == 0) {
        const int r1 = used.row[1];
        const C w0 = used.weight[0], w1 = used.weight[1];
        for (; at + kUnroll * kStep <= run.end; at += kUnroll * kStep) {
          Part g[kUnroll], d[kUnroll], base[kUnroll] = {};
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int i = at + u * kStep + lane * kCount;
            g[u] = rows.load(0, i);
            d[u] = rows.load(r1, i);
            if (from_base) base[u] = rows.load(p.base, i);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int i = at + u * kStep + lane * kCount;
            C v0[kCount], v1[kCount], total[kCount];
            rows.values(0, i, g[u], v0);
            rows.values(r1, i, d[u], v1);
            if (from_base) subtract_from(i, base[u], v0);
#pragma unroll
            for (int e = 0; e < kCount; ++e) total[e] = w0 * v0[e] + w1 * v1[e];
            if (from_base) subtract_from(i, base[u], total);
            Access::template store<C>(rows.at(0, i), total, rows.dtype(0), 0, kCount);
          }
        }
      } else if (aligned) {
        for (; at + kStep <= run.end; at += kStep) {
          const int i = at + lane * kCount;
          Part base{};
          if (from_base) base = rows.load(p.base, i);
          C total[kCount] = {};
          auto group = [&](auto size, int k) {
            constexpr int kRows = decltype(size)::value;
            Part part[kRows];
#pragma unroll
            for (int j = 0; j < kRows; ++j) part[j] = rows.load(used.row[k + j], i);
#pragma unroll
            for (int j = 0; j < kRows; ++j) {
              C v[kCount];
              rows.values(used.row[k + j], i, part[j], v);
              if (from_base && used.row[k + j] == 0) subtract_from(i, base, v);
              add(total, used.weight[k + j], v);
            }
          };
          for (int k = 0, larger = used.larger; k < used.count; --larger) {
            const int size = used.size + (larger > 0);
            if (size == 4) group(std::integral_constant<int, 4>{}, k);
            if (size == 3) group(std::integral_constant<int, 3>{}, k);
            if (size == 2) group(std::integral_constant<int, 2>{}, k);
            if (size == 1) group(std::integral_constant<int, 1>{}, k);
            k += size;
          }
          if (from_base) subtract_from(i, base, total);
          Access::template store<C>(rows.at(0, i), total, rows.dtype(0), 0, kCount);
        }
      }
      some(run.end);
    });
  }
}

// The same for one strided piece, an element per thread.
template <typename C, int kBuffers>
__global__ __launch_bounds__(kThreads, 4) void combine_strided(const __grid_constant__ StridedPiece<kBuffers> p, WeightSource source) {
  __shared__ Used<C> used;
  find_used(used, source, p.part, p.info, p.rows);
  if (used.unchanged) return;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numel; i += int64_t{gridDim.x} * kThreads) {
    const Element<C, StridedPiece<kBuffers>> element(p, i);
    C total = C(0);
    for (int k = 0; k < used.count; ++k) total += used.weight[k] * element.value(used.row[k]);
    element.store(p.base ? element.load(p.base) - total : total);
  }
}

// Row 0 of every part from weights [parts, R]. Refuses before anything is launched.
void launch_combine(const Device& device, const Plan& plan, const double* weights);

// Gram pass and combine with nothing in between: K = 1 and one part. scratch: gram_scratch doubles.
void launch_project_one(const Device& device, const Plan& plan, Rule rule, double* scratch, double* gram, double* weights);

}  // namespace gradproj::cuda

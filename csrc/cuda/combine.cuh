// Row 0 <- sum_r weights[r] row r, and, fused in front of it at K = 1, the weights themselves.
#pragma once

#include "../weights.h"
#include "gram.cuh"

namespace gradproj::cuda {

// Where a combine kernel finds its weights. slots == 0: in `weights`. Otherwise K = 1 and a Gram pass has just left its
// partial sums: every block adds them up for itself (a few thousand doubles out of L2) and applies the rule, so nothing has to
// run between the two passes over the gradients; block 0 also writes the results down.
struct WeightSource {
  double* weights;
  const double* partial;
  int64_t slots;
  double* gram;
  Rule rule;
};

// The rows that a block has to read, and their weights.
template <typename C>
struct Used {
  C weight[kMaxRows];
  int row[kMaxRows];  // index within the launch
  int count;
  bool unchanged;  // weights (1, 0, .., 0): nothing is read or written
};

template <typename C>
__device__ inline void find_used(Used<C>& used, const WeightSource& source, const RowInfo& info, int rows) {
  __shared__ double products[3];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (source.slots > 0) {
    for (int p = warp; p < 3; p += kWarps) {
      const double sum = sum_slots(source.partial, source.slots, 3, p, lane);
      if (lane == 0) products[p] = sum;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    double solved[2] = {1.0, 0.0};
    if (source.slots > 0) {
      solve_weights_k1(source.rule, products[0], products[1], products[2], solved);
      if (blockIdx.x == 0) {
        source.weights[0] = solved[0];
        source.weights[1] = solved[1];
        source.gram[0] = products[0];
        source.gram[1] = source.gram[2] = products[1];
        source.gram[3] = products[2];
      }
    }
    used.count = 0;
    used.unchanged = true;
    for (int r = 0; r < rows; ++r) {
      const int id = info.id[r];
      const double w = source.slots > 0 ? (id == 0 ? solved[0] : solved[1]) : source.weights[id];
      used.unchanged = used.unchanged && w == (id == 0 ? 1.0 : 0.0);
      if (w == 0.0) continue;
      used.row[used.count] = r;
      used.weight[used.count] = static_cast<C>(w);
      ++used.count;
    }
  }
  __syncthreads();
}

// Reads the rows whose weight is not 0 once and writes row 0 once, in accesses of 16 bytes but for the head and tail of a
// segment and rows that are not aligned as row 0 is. Walks backwards: what a Gram pass read last is still in L2. All rows of
// an element are loaded before it is stored.
template <typename C, typename Access, int kBytes>
__global__ __launch_bounds__(kThreads, Access::kMixed ? 3 : 0) void combine_dense(const __grid_constant__ Segments<kBytes> p, WeightSource source) {
  constexpr int kCount = Access::kCount;
  constexpr int kUnroll = Access::kMixed ? 2 : 4;
  constexpr int64_t kStep = 32 * kCount;
  using Raw = typename Access::Raw;
  __shared__ Used<C> used;
  find_used(used, source, p.info, p.rows);
  if (used.unchanged) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t granules = p.end(p.count - 1), chunks = (granules + p.chunk - 1) / p.chunk;
  const bool two = used.count == 2 && used.row[0] == 0;
  const int row0_bytes = Access::element_bytes(p.info.dtype[0]);

  for (uint32_t c = blockIdx.x * kWarps + warp; c < chunks; c += gridDim.x * kWarps) {
    const uint32_t first = (chunks - 1 - c) * p.chunk;
    const uint32_t last = granules - first < p.chunk ? granules : first + p.chunk;
    for_each_run(p, row0_bytes, first, last, [&](const Run& run) {
      auto base = [&](int r) { return p.address(run.segment, r) - run.pad * Access::element_bytes(p.info.dtype[r]); };
      auto aligned = [&](int r) { return Access::aligned(base(r), p.info.dtype[r]); };
      auto at_row = [&](int r, int64_t i) { return base(r) + i * Access::element_bytes(p.info.dtype[r]); };
      char* out = const_cast<char*>(base(0));
      int64_t at = run.begin;
      auto some = [&](int64_t stop) {  // any number of rows, any alignment, heads and tails
        for (; at < stop; at += kStep) {
          const int64_t i = at + lane * kCount;
          const int from = i < run.pad ? static_cast<int>(run.pad - i < kCount ? run.pad - i : kCount) : 0;
          const int to = i + kCount <= run.end ? kCount : i < run.end ? static_cast<int>(run.end - i) : 0;
          if (from >= to) continue;
          const bool whole = from == 0 && to == kCount;
          C total[kCount];
#pragma unroll
          for (int e = 0; e < kCount; ++e) total[e] = C(0);
#pragma unroll 4
          for (int k = 0; k < used.count; ++k) {
            const int r = used.row[k], dtype = p.info.dtype[r];
            const Raw raw = whole && aligned(r) ? Access::load(at_row(r, i), dtype)
                                                : Access::load_some(at_row(r, i), dtype, from, to);
#pragma unroll
            for (int e = 0; e < kCount; ++e) total[e] += used.weight[k] * Access::template get<C>(raw, e, dtype);
          }
          Access::template store<C>(out + i * row0_bytes, total, p.info.dtype[0], from, to);
        }
      };
      const int64_t head = run.pad > run.begin ? run.begin + kStep : run.begin;
      some(head < run.end ? head : run.end);
      if (two && aligned(0) && aligned(used.row[1])) {
        const int r1 = used.row[1], dtype0 = p.info.dtype[0], dtype1 = p.info.dtype[r1];
        const C w0 = used.weight[0], w1 = used.weight[1];
        for (; at + kUnroll * kStep <= run.end; at += kUnroll * kStep) {
          Raw g[kUnroll], d[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t i = at + u * kStep + lane * kCount;
            g[u] = Access::load(at_row(0, i), dtype0);
            d[u] = Access::load(at_row(r1, i), dtype1);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            C total[kCount];
#pragma unroll
            for (int e = 0; e < kCount; ++e)
              total[e] = w0 * Access::template get<C>(g[u], e, dtype0) + w1 * Access::template get<C>(d[u], e, dtype1);
            Access::template store<C>(out + (at + u * kStep + lane * kCount) * row0_bytes, total, dtype0, 0, kCount);
          }
        }
      }
      some(run.end);
    });
  }
}

// The same for one strided piece, an element per thread.
template <typename C>
__global__ __launch_bounds__(kThreads) void combine_strided(const __grid_constant__ StridedPiece p, WeightSource source) {
  __shared__ Used<C> used;
  find_used(used, source, p.info, p.rows);
  if (used.unchanged) return;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numel; i += int64_t{gridDim.x} * kThreads) {
    const Coordinates at(p, i);
    C total = C(0);
    for (int k = 0; k < used.count; ++k) {
      const int r = used.row[k];
      total += used.weight[k] * load_one<C>(p.address[r], at.offset(p, r), p.info.dtype[r]);
    }
    store_one(const_cast<char*>(p.address[0]), at.offset(p, 0), p.info.dtype[0], total);
  }
}

void launch_combine(const Device& device, const Plan& plan, const WeightSource& source);

// Gram pass and combine with nothing in between: K = 1. scratch: gram_scratch doubles.
void launch_project_one(const Device& device, const Plan& plan, Rule rule, double* scratch, double* gram, double* weights);

}  // namespace gradproj::cuda

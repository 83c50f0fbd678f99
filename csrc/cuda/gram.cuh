// Inner products of rows: a first kernel writes one set of float64 sums per block, a second adds the blocks up. No atomics
// and no counter: the order of every sum is fixed by the grid, so the same buffers give the same bits, launches on different
// streams cannot disturb each other, and a captured graph can be replayed anywhere.
#pragma once

#include <vector>

#include "load.cuh"

namespace gradproj::cuda {

constexpr int kPassRows = 9;  // rows whose products one launch accumulates

// The sums of one pass over `width` rows: of all pairs, or of row 0 with each (row_only). RowInfo::id is a row's position
// in the pass. A slot is `pairs` doubles. With one part, blocks own one each and later launches of the pass add to it. With
// more, blocks take contiguous ranges and the sums of one block and one part are slot number block + part: no two share one,
// because blocks and parts both ascend along a launch; each launch is added up by itself.
struct Slots {
  double* partial;
  int32_t width;
  int32_t pairs;
  bool row_only;
  bool fresh;              // nothing is there yet that has to be kept
  uint8_t row[kPassRows];  // of the call, by position

  __host__ __device__ int pair(int i, int j) const { return row_only ? j : i * width - i * (i - 1) / 2 + j - i; }
};

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Sums that a warp keeps while it walks its chunks: C products of up to 48 elements per lane, widened after every chunk. Of equal
// elements every addition may round the same way: 48 of them cost 8e-7 of the sum.
template <typename C, int kRows, bool kRowOnly>
struct Sums {
  static constexpr int kPairs = kRowOnly ? kRows : kRows * (kRows + 1) / 2;
  static constexpr bool kPerLane = kPairs <= 3;  // else a lane's registers would not hold them: lane p % 32 keeps pair p
  static constexpr int kTotals = kPerLane ? kPairs : (kPairs + 31) / 32;
  C products[kPairs];
  double totals[kTotals];

  __device__ Sums() {
#pragma unroll
    for (int t = 0; t < kTotals; ++t) totals[t] = 0.0;
    clear();
  }
  __device__ void clear() {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) products[p] = C(0);
  }
  __device__ void add(const C (&v)[kRows]) {
    int p = 0;
#pragma unroll
    for (int i = 0; i < (kRowOnly ? 1 : kRows); ++i)
#pragma unroll
      for (int j = i; j < kRows; ++j) {
        products[p] += v[i] * v[j];
        ++p;
      }
  }
  __device__ void widen_products(int lane) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if constexpr (kPerLane) {
        totals[p] += static_cast<double>(products[p]);
      } else {
        const double sum = warp_sum(static_cast<double>(products[p]));
        if (lane == p % 32) totals[p / 32] += sum;
      }
    }
    clear();
  }
  // The block's sums into a slot. Every thread of the block must call it.
  __device__ void finish(const Slots& slots, int64_t number, const RowInfo& info, int rows, double (*shared)[kPairs]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if constexpr (kPerLane) {
        const double sum = warp_sum(totals[p]);
        if (lane == 0) shared[warp][p] = sum;
      } else if (lane == p % 32) {
        shared[warp][p] = totals[p / 32];
      }
    }
    double* slot = slots.partial + number * slots.pairs;
    if (slots.fresh)
      for (int p = static_cast<int>(threadIdx.x); p < slots.pairs; p += kThreads) slot[p] = 0.0;
    __syncthreads();
    for (int p = static_cast<int>(threadIdx.x); p < kPairs; p += kThreads) {
      int i = 0, j = p;
      if (!kRowOnly)
        for (; j >= kRows - i; ++i) j -= kRows - i;
      j += i;
      if (j >= rows) continue;
      double sum = 0.0;
      for (int w = 0; w < kWarps; ++w) sum += shared[w][p];
      slot[slots.pair(info.id[i], info.id[j])] += sum;
    }
  }
};

// Blocks that shall fit a multiprocessor together, which is what the compiler may spend registers on: half occupancy where
// two rows of one type are streamed in float, less where a base and scales come with them or 45 sums have to be kept.
template <typename C, typename Access>
constexpr int blocks_per_sm(int rows) {
  if (rows == 2) return Access::kMixed ? 2 : sizeof(C) == 8 ? 3 : 4;
  if (sizeof(C) == 8) return 1;
  return rows <= 5 && Access::kCount < 8 ? 2 : 1;
}

// Products of the rows of dense segments. Reads each element of each row once, in accesses of 16 bytes but for the head and
// tail of a segment and rows that are not aligned as row 0 is; writes slots.pairs doubles per block, and per part that a block
// touches. A warp keeps kRows * kUnroll accesses of 16 bytes per lane in flight.
template <typename C, typename Access, int kRows, bool kRowOnly, int kBytes>
__global__ __launch_bounds__(kThreads, blocks_per_sm<C, Access>(kRows)) void gram_dense(const __grid_constant__ Segments<kBytes> p, Slots slots) {
  constexpr int kCount = Access::kCount;
  constexpr int kUnroll = kRows == 2 ? 2 : 1;
  constexpr int kStep = 32 * kCount;
  constexpr bool kWhole = !Access::kMixed || kRows == 2 || kRowOnly;  // a loop of its own without masks: 45 sums leave no room
  using Rows = RunRows<C, Access, Segments<kBytes>>;
  using Part = typename Rows::Part;
  __shared__ double shared[kWarps][Sums<C, kRows, kRowOnly>::kPairs];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t granules = p.end(p.count - 1);
  Sums<C, kRows, kRowOnly> sums;

  auto walk = [&](uint32_t first, uint32_t stop, uint32_t stride) {
    for (; first < stop; first += stride) {
      const uint32_t last = stop - first < p.chunk ? stop : first + p.chunk;
      for_each_run(p, Access::element_bytes(p.info.dtype[0]), first, last, [&](const Run& run) {
        const Rows rows(p, run);
        const bool from_base = Access::kMixed && p.base > 0;
        bool aligned = !from_base || rows.aligned(p.base);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (r < p.rows) aligned = aligned && rows.aligned(r);
        auto add = [&](int i, const Part (&part)[kRows], const Part& base) {
          C v[kRows][kCount] = {};
          if constexpr (Access::kMixed) {
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              if (r < p.rows) rows.values(r, i, part[r], v[r]);
            if (from_base) {
              C b[kCount];
              rows.values(p.base, i, base, b);
#pragma unroll
              for (int e = 0; e < kCount; ++e) v[0][e] = b[e] - v[0][e];
            }
          }
#pragma unroll
          for (int e = 0; e < kCount; ++e) {
            C column[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              if constexpr (Access::kMixed)
                column[r] = v[r][e];
              else  // one by one: widened all at once, they spill on sm_100
                column[r] = r < p.rows ? Access::template value<C>(part[r], e) : C(0);
            }
            sums.add(column);
          }
        };
        int at = 0;                     // of the warp: the same for all lanes
        auto some = [&](int stop_at) {  // any alignment, heads and tails
          for (; at < stop_at; at += kStep) {
            const int i = at + lane * kCount;
            const int from = i < run.pad ? (run.pad - i < kCount ? run.pad - i : kCount) : 0;
            const int to = i + kCount <= run.end ? kCount : i < run.end ? run.end - i : 0;
            Part part[kRows], base{};
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              if (r < p.rows) part[r] = rows.load_some(r, i, from, to);
            if (from_base) base = rows.load_some(p.base, i, from, to);
            add(i, part, base);
          }
        };
        if (run.pad > 0) some(kStep < run.end ? kStep : run.end);
        if (aligned && kWhole)
          for (; at + kUnroll * kStep <= run.end; at += kUnroll * kStep) {
            Part part[kUnroll][kRows], base[kUnroll] = {};
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
              const int i = at + u * kStep + lane * kCount;
#pragma unroll
              for (int r = 0; r < kRows; ++r)
                if (r < p.rows) part[u][r] = rows.load(r, i);
              if (from_base) base[u] = rows.load(p.base, i);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) add(at + u * kStep + lane * kCount, part[u], base[u]);
          }
        some(run.end);
      });
      sums.widen_products(lane);
    }
  };

  if constexpr (!Access::kMixed) {
    walk((blockIdx.x * kWarps + warp) * p.chunk, granules, gridDim.x * kWarps * p.chunk);
    sums.finish(slots, blockIdx.x, p.info, p.rows, shared);
  } else {
    uint32_t at = blockIdx.x * p.per_block;
    const uint32_t stop = at < granules && granules - at > p.per_block ? at + p.per_block : granules;
    for (;;) {  // one part at a time; a block without granules still clears its slot
      uint32_t end = stop;
      int32_t part = 0;
      if (p.parts && at < stop) {
        part = p.part(p.first_at(at));
        const uint32_t next = p.begin(p.first_of(part + 1));
        end = next < stop ? next : stop;
      }
      walk(at + warp * p.chunk, end, kWarps * p.chunk);
      sums.finish(slots, int64_t{blockIdx.x} + part, p.info, p.rows, shared);
      at = end;
      if (at >= stop) break;
      __syncthreads();  // until all have read `shared`
      sums = {};
    }
  }
}

// The same for one strided piece, an element per lane.
template <typename C, bool kRowOnly>
__global__ __launch_bounds__(kThreads) void gram_strided(const __grid_constant__ SmallStrided p, Slots slots) {
  constexpr int64_t kChunk = 32 * kMostOfALane;
  __shared__ double shared[kWarps][Sums<C, kPassRows, kRowOnly>::kPairs];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Sums<C, kPassRows, kRowOnly> sums;
  for (int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * kChunk; first < p.numel;
       first += int64_t{gridDim.x} * kWarps * kChunk) {
    const int64_t last = first + kChunk < p.numel ? first + kChunk : p.numel;
    for (int64_t i = first + lane; i < last; i += 32) {
      const Element<C, SmallStrided> element(p, i);
      C v[kPassRows];
#pragma unroll
      for (int r = 0; r < kPassRows; ++r) v[r] = r < p.rows ? element.value(r) : C(0);
      sums.add(v);
    }
    sums.widen_products(lane);
  }
  sums.finish(slots, blockIdx.x, p.info, p.rows, shared);
}

// Sum of one pair over all slots, by one warp, in fixed order.
__device__ inline double sum_slots(const double* partial, int64_t count, int pairs, int pair, int lane) {
  double sum = 0.0;
  for (int64_t s = lane; s < count; s += 32) sum += partial[s * pairs + pair];
  return warp_sum(sum);
}

// Where the sums go: [parts, R, R].
struct Target {
  double* gram;
  const double* known;  // [parts, R - 1, R - 1], to be copied to rows and columns 1.. of the Gram; null: nothing is
  int32_t R;
  bool add;  // to what an earlier launch of the pass left there
};

// Adds up slots first, first + 1, .. of one part. Reads count * pairs doubles. One block.
__device__ inline void add_up(const Slots& slots, int64_t first, int64_t count, const Target& target, int64_t part) {
  const int lane = static_cast<int>(threadIdx.x) % 32, R = target.R, K = R - 1;
  double* gram = target.gram + part * R * R;
  for (int p = static_cast<int>(threadIdx.x) / 32; p < slots.pairs; p += kWarps) {
    int i = 0, j = p;
    if (!slots.row_only)
      for (; j >= slots.width - i; ++i) j -= slots.width - i;
    j += i;
    double sum = sum_slots(slots.partial + first * slots.pairs, count, slots.pairs, p, lane);
    if (lane != 0) continue;
    double& value = gram[slots.row[i] * R + slots.row[j]];
    if (target.add) sum += value;
    value = gram[slots.row[j] * R + slots.row[i]] = sum;
  }
  if (target.known)
    for (int k = static_cast<int>(threadIdx.x); k < K * K; k += kThreads)
      gram[(k / K + 1) * R + k % K + 1] = target.known[part * K * K + k];
}

// One part, or none: count slots to each of gridDim.x parts.
template <int = 0>  // so that it may be defined in a header
__global__ __launch_bounds__(kThreads) void gram_finish(const __grid_constant__ Slots slots, int64_t count, Target target) {
  add_up(slots, 0, count, target, blockIdx.x);
}

// Parts begin, begin + 1, .. after a launch over dense segments, a block for each.
template <int kBytes>
__global__ __launch_bounds__(kThreads) void gram_finish_parts(const __grid_constant__ Segments<kBytes> p,
                                                               const __grid_constant__ Slots slots, int32_t begin, Target target) {
  const int32_t part = begin + static_cast<int32_t>(blockIdx.x);
  const int first = p.first_of(part), last = p.first_of(part + 1);
  if (first == last) return add_up(slots, 0, 0, target, part);
  const uint32_t from = p.begin(first) / p.per_block, to = (p.begin(last) - 1) / p.per_block;
  add_up(slots, int64_t{from} + part, to - from + 1, target, part);
}

struct Device {
  cudaStream_t stream;
  int64_t most_blocks;  // of the grid; fixed for a device, so that sums are
  bool large_params;    // 32,764 bytes of kernel parameters
};

// Doubles of scratch that the Gram of a plan needs: a slot for each block, and one more for each of several parts.
inline int64_t gram_scratch(const Device& device, const Plan& plan) {
  const int R = plan.gram_rows();
  return (device.most_blocks + (plan.parts > 1 ? plan.parts : 0)) * (R <= kPassRows ? R * (R + 1) / 2 : kPassRows);
}

// Sums of one pass over the rows `wanted`, [0] first. Without a target they stay in their slots (one part only), whose number is
// returned.
template <typename C>
int64_t launch_pass(const Device& device, const Plan& plan, const std::vector<int>& wanted, bool row_only, double* partial,
                    const Target* target);

extern template int64_t launch_pass<float>(const Device&, const Plan&, const std::vector<int>&, bool, double*, const Target*);
extern template int64_t launch_pass<double>(const Device&, const Plan&, const std::vector<int>&, bool, double*, const Target*);

inline int64_t launch_pass(const Device& device, const Plan& plan, const std::vector<int>& wanted, bool row_only, double* partial,
                           const Target* target) {
  return plan.any_f64 ? launch_pass<double>(device, plan, wanted, row_only, partial, target)
                      : launch_pass<float>(device, plan, wanted, row_only, partial, target);
}

// The Gram of every part into gram [parts, R, R]. known: [parts, R - 1, R - 1] of rows 1.., copied instead of computed, or null.
// scratch: gram_scratch doubles. Up to 9 rows in one pass; more as passes of one row against eight others.
void launch_gram(const Device& device, const Plan& plan, const double* known, double* scratch, double* gram);

}  // namespace gradproj::cuda

// Inner products of rows: a first kernel writes one set of float64 sums per block, a second adds the blocks up. No atomics
// and no counter: the order of every sum is fixed by the grid, so the same buffers give the same bits, launches on different
// streams cannot disturb each other, and a captured graph can be replayed anywhere.
#pragma once

#include <vector>

#include "load.cuh"

namespace gradproj::cuda {

constexpr int kPassRows = 9;  // rows whose products one launch accumulates
constexpr int kPassPairs = kPassRows * (kPassRows + 1) / 2;

// The sums of one pass over `width` rows: of all pairs, or of row 0 with each (row_only). RowInfo::id is a row's position
// in the pass. Blocks own a slot of `pairs` doubles each; later launches of the pass add to it.
struct Slots {
  double* partial;
  int32_t width;
  int32_t pairs;
  bool row_only;
  bool fresh;  // the first launch of the pass: nothing there yet

  __host__ __device__ int pair(int i, int j) const { return row_only ? j : i * width - i * (i - 1) / 2 + j - i; }
};

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Sums that a warp keeps while it walks its chunks: C products of up to 64 elements per lane, widened after every chunk.
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
  // The block's sums into its slot. Every thread of the block must call it.
  __device__ void finish(const Slots& slots, const RowInfo& info, int rows, double (*shared)[kPairs]) {
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
    double* slot = slots.partial + int64_t{blockIdx.x} * slots.pairs;
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
// two rows of one type are streamed in float, less where 45 sums have to be kept.
template <typename C, typename Access>
constexpr int blocks_per_sm(int rows) {
  if (sizeof(C) == 8) return rows == 2 ? 3 : 1;
  if (rows == 2) return Access::kMixed || Access::kCount == 8 ? 3 : 4;
  return rows <= 5 && Access::kCount < 8 ? 2 : 1;
}

// Products of the rows of dense segments. Reads each element of each row once, in accesses of 16 bytes but for the head and
// tail of a segment and rows that are not aligned as row 0 is; writes slots.pairs doubles per block. A warp keeps
// kRows * kUnroll accesses of 16 bytes per lane in flight.
template <typename C, typename Access, int kRows, bool kRowOnly, int kBytes>
__global__ __launch_bounds__(kThreads, blocks_per_sm<C, Access>(kRows)) void gram_dense(const __grid_constant__ Segments<kBytes> p, Slots slots) {
  constexpr int kCount = Access::kCount;
  constexpr int kUnroll = kRows == 2 && kCount <= 4 ? 2 : 1;
  constexpr int64_t kStep = 32 * kCount;
  using Raw = typename Access::Raw;
  __shared__ double shared[kWarps][Sums<C, kRows, kRowOnly>::kPairs];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t granules = p.end(p.count - 1), stride = gridDim.x * kWarps * p.chunk;
  Sums<C, kRows, kRowOnly> sums;

  for (uint32_t first = (blockIdx.x * kWarps + warp) * p.chunk; first < granules; first += stride) {
    const uint32_t last = granules - first < p.chunk ? granules : first + p.chunk;
    for_each_run(p, Access::element_bytes(p.info.dtype[0]), first, last, [&](const Run& run) {
      auto bytes = [&](int r) { return Access::element_bytes(p.info.dtype[r]); };
      auto base = [&](int r) { return p.address(run.segment, r) - run.pad * bytes(r); };
      bool aligned = true;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < p.rows) aligned = aligned && Access::aligned(base(r), p.info.dtype[r]);
      auto add = [&](const Raw (&raw)[kRows]) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          C v[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) v[r] = r < p.rows ? Access::template get<C>(raw[r], e, p.info.dtype[r]) : C(0);
          sums.add(v);
        }
      };
      int64_t at = run.begin;  // of the warp: the same for all lanes
      const int64_t head = run.pad > run.begin ? run.begin + kStep : run.begin;
      auto some = [&](int64_t stop) {  // any alignment, heads and tails
        for (; at < stop; at += kStep) {
          const int64_t i = at + lane * kCount;
          const int from = i < run.pad ? static_cast<int>(run.pad - i < kCount ? run.pad - i : kCount) : 0;
          const int to = i + kCount <= run.end ? kCount : i < run.end ? static_cast<int>(run.end - i) : 0;
          Raw raw[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (r < p.rows)
              raw[r] = from == 0 && to == kCount && Access::aligned(base(r), p.info.dtype[r])
                           ? Access::load(base(r) + i * bytes(r), p.info.dtype[r])
                           : Access::load_some(base(r) + i * bytes(r), p.info.dtype[r], from, to);
          add(raw);
        }
      };
      some(head < run.end ? head : run.end);
      if (aligned)
        for (; at + kUnroll * kStep <= run.end; at += kUnroll * kStep) {
          Raw raw[kUnroll][kRows];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              if (r < p.rows)
                raw[u][r] = Access::load(base(r) + (at + u * kStep + lane * kCount) * bytes(r), p.info.dtype[r]);
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) add(raw[u]);
        }
      some(run.end);
    });
    sums.widen_products(lane);
  }
  sums.finish(slots, p.info, p.rows, shared);
}

// The same for one strided piece, an element per lane.
template <typename C, bool kRowOnly>
__global__ __launch_bounds__(kThreads) void gram_strided(const __grid_constant__ StridedPiece p, Slots slots) {
  constexpr int64_t kChunk = 2048;
  __shared__ double shared[kWarps][Sums<C, kPassRows, kRowOnly>::kPairs];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Sums<C, kPassRows, kRowOnly> sums;
  for (int64_t first = (int64_t{blockIdx.x} * kWarps + warp) * kChunk; first < p.numel;
       first += int64_t{gridDim.x} * kWarps * kChunk) {
    const int64_t last = first + kChunk < p.numel ? first + kChunk : p.numel;
    for (int64_t i = first + lane; i < last; i += 32) {
      const Coordinates at(p, i);
      C v[kPassRows];
#pragma unroll
      for (int r = 0; r < kPassRows; ++r)
        v[r] = r < p.rows ? load_one<C>(p.address[r], at.offset(p, r), p.info.dtype[r]) : C(0);
      sums.add(v);
    }
    sums.widen_products(lane);
  }
  sums.finish(slots, p.info, p.rows, shared);
}

// Sum of one pair over all slots, by one warp, in fixed order.
__device__ inline double sum_slots(const double* partial, int64_t count, int pairs, int pair, int lane) {
  double sum = 0.0;
  for (int64_t s = lane; s < count; s += 32) sum += partial[s * pairs + pair];
  return warp_sum(sum);
}

// Adds the slots up into gram[R x R], at the rows `ids` of the pass. One block. Reads count * pairs doubles.
template <int = 0>  // so that it may be defined in a header
__global__ __launch_bounds__(kThreads) void gram_finish(Slots slots, int64_t count, RowInfo ids, double* gram, int R) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int p = static_cast<int>(threadIdx.x) / 32; p < slots.pairs; p += kWarps) {
    int i = 0, j = p;
    if (!slots.row_only)
      for (; j >= slots.width - i; ++i) j -= slots.width - i;
    j += i;
    const double sum = sum_slots(slots.partial, count, slots.pairs, p, lane);
    if (lane == 0) gram[ids.id[i] * R + ids.id[j]] = gram[ids.id[j] * R + ids.id[i]] = sum;
  }
}

struct Device {
  cudaStream_t stream;
  int64_t most_blocks;  // of the grid; fixed for a device, so that sums are
  bool large_params;    // 32,764 bytes of kernel parameters
};

// Doubles of scratch that a Gram needs: a slot for each block.
inline int64_t gram_scratch(const Device& device) { return device.most_blocks * kPassPairs; }

// Sums of one pass into slots; returns how many slots hold something.
template <typename C>
int64_t launch_pass(const Device& device, const Plan& plan, const std::vector<int>& wanted, bool row_only, double* partial);

extern template int64_t launch_pass<float>(const Device&, const Plan&, const std::vector<int>&, bool, double*);
extern template int64_t launch_pass<double>(const Device&, const Plan&, const std::vector<int>&, bool, double*);

inline int64_t launch_pass(const Device& device, const Plan& plan, const std::vector<int>& wanted, bool row_only, double* partial) {
  return plan.any_f64 ? launch_pass<double>(device, plan, wanted, row_only, partial)
                      : launch_pass<float>(device, plan, wanted, row_only, partial);
}

// The whole Gram into gram[R x R]; with row_only, row and column 0 of it. scratch: gram_scratch doubles.
// Up to 9 rows in one pass; more as passes of one row against eight others.
void launch_gram(const Device& device, const Plan& plan, bool row_only, double* scratch, double* gram);

}  // namespace gradproj::cuda

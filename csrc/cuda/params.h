// Kernel parameters: the pieces of a plan, by value. Nothing is uploaded, so nothing has to be pinned, cached or kept alive,
// and a captured graph owns its copy.
//
// Elements are counted in granules of 64. A segment is a dense piece, padded in front so that its first granule starts on a
// 16-byte boundary of row 0 (the pad is masked, not read). Per segment: one address per row, and one 32-bit word with the
// cumulative count of granules in its upper 26 bits and the index of the last element within the last granule in its lower 6.
// At K = 1 that is 20 bytes: 1,600 segments in one launch; a launch covers up to 4.29e9 elements, larger plans take several.
#pragma once

#include "../plan.h"
#include "runtime.h"

namespace gradproj::cuda {

constexpr int kGranule = 64;
constexpr uint32_t kMaxGranules = (1u << 26) - 1;

struct RowInfo {
  uint8_t id[kMaxRows];     // which row of the call: indexes weights and the Gram
  uint8_t dtype[kMaxRows];  // DType
};

// kBytes: 4,096 everywhere; 32,764 with CUDA 12.1 and later on compute capability 7.0 and later.
template <int kBytes>
struct Segments {
  static constexpr int kWords = (kBytes - 16 - static_cast<int>(sizeof(RowInfo)) - 64) / 8;  // 64: the kernels' other parameters
  uint64_t words[kWords];  // addresses, row by row within a segment, then the 32-bit words, two each
  int32_t count;
  int32_t rows;
  uint32_t chunk;  // granules that a warp takes at a time
  RowInfo info;

  static constexpr int capacity(int rows) { return static_cast<int>((int64_t{kWords} * 8 - 8) / (8 * rows + 4)); }

  __host__ __device__ uint32_t packed(int s) const {
    const uint64_t two = words[count * rows + (s >> 1)];
    return static_cast<uint32_t>(s & 1 ? two >> 32 : two);
  }
  __host__ __device__ uint32_t end(int s) const { return packed(s) >> 6; }
  __host__ __device__ uint32_t begin(int s) const { return s ? end(s - 1) : 0; }
  __host__ __device__ const char* address(int s, int r) const { return reinterpret_cast<const char*>(words[s * rows + r]); }
};
using SmallSegments = Segments<4096>;
using LargeSegments = Segments<32764>;
static_assert(sizeof(SmallSegments) + 64 <= 4096, "kernel parameters hold 4,096 bytes");
static_assert(sizeof(LargeSegments) + 64 <= 32764, "kernel parameters hold 32,764 bytes");

// One piece whose rows have no common dense order.
struct StridedPiece {
  int64_t numel;
  int64_t sizes[kMaxDims];
  double inverse[kMaxDims];             // 1 / sizes: a division on the device costs a call
  int64_t strides[kMaxRows][kMaxDims];  // in elements
  const char* address[kMaxRows];
  int32_t ndim;
  int32_t rows;
  RowInfo info;
};
static_assert(sizeof(StridedPiece) + 64 <= 32764, "kernel parameters hold 32,764 bytes");

// All pieces that one kernel instance can take: the same rows present, of the same dtypes.
struct Bucket {
  std::vector<int> rows;       // ids of the rows that are present
  std::vector<DType> dtypes;   // of those rows
  std::vector<size_t> pieces;  // dense ones, in the order of the plan
};

inline bool uniform(const std::vector<DType>& dtypes) {
  return std::all_of(dtypes.begin(), dtypes.end(), [&](DType t) { return t == dtypes[0]; });
}

// Elements before row 0's first 16-byte boundary are counted from that boundary: how many elements to pad in front.
__host__ __device__ inline int front_pad(const char* address, int element_bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16) / element_bytes;
}

inline int64_t granules_of(const char* address, DType dtype, int64_t numel) {
  return (front_pad(address, static_cast<int>(element_size(dtype))) + numel + kGranule - 1) / kGranule;
}

// The dense pieces of a plan, restricted to the rows `wanted`, sorted into buckets. A piece in which none of them is present
// is left out.
inline std::vector<Bucket> make_buckets(const Plan& plan, const std::vector<int>& wanted) {
  std::vector<Bucket> buckets;
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    if (plan.pieces[p].ndim > 0) continue;
    Bucket key;
    for (int r : wanted) {
      const RowView& v = plan.row_views(p)[r];
      if (!v.data) continue;
      key.rows.push_back(r);
      key.dtypes.push_back(v.dtype);
    }
    if (key.rows.empty()) continue;
    auto same = [&](const Bucket& b) { return b.rows == key.rows && b.dtypes == key.dtypes; };
    auto found = std::find_if(buckets.begin(), buckets.end(), same);
    if (found == buckets.end()) found = buckets.insert(buckets.end(), std::move(key));
    found->pieces.push_back(p);
  }
  return buckets;
}

// Calls f(segments) for as many parameter blocks of size kBytes as the bucket's pieces need. A piece longer than a launch
// can count is cut at a granule's border.
template <int kBytes, typename F>
void for_each_batch(const Plan& plan, const Bucket& bucket, uint32_t granule_limit, const F& f) {
  Segments<kBytes> s;
  const int rows = static_cast<int>(bucket.rows.size());
  const int capacity = Segments<kBytes>::capacity(rows);
  s.rows = rows;
  for (int r = 0; r < rows; ++r) {
    s.info.id[r] = static_cast<uint8_t>(bucket.rows[static_cast<size_t>(r)]);
    s.info.dtype[r] = static_cast<uint8_t>(bucket.dtypes[static_cast<size_t>(r)]);
  }
  std::vector<uint32_t> packed;
  uint32_t total = 0;
  auto flush = [&] {
    if (packed.empty()) return;
    s.count = static_cast<int32_t>(packed.size());
    for (size_t i = 0; i < packed.size(); i += 2)
      s.words[packed.size() * static_cast<size_t>(rows) + i / 2] =
          packed[i] | (i + 1 < packed.size() ? static_cast<uint64_t>(packed[i + 1]) << 32 : 0);
    f(s, total);
    packed.clear();
    total = 0;
  };
  for (size_t p : bucket.pieces) {
    const RowView* views = plan.row_views(p);
    for (int64_t done = 0; done < plan.pieces[p].numel;) {
      if (static_cast<int>(packed.size()) == capacity || total >= granule_limit) flush();
      const char* first = views[bucket.rows[0]].data + done * element_size(bucket.dtypes[0]);
      const int pad = front_pad(first, static_cast<int>(element_size(bucket.dtypes[0])));
      const int64_t left = plan.pieces[p].numel - done;
      const int64_t room = int64_t{granule_limit - total} * kGranule - pad;
      const int64_t take = std::min(left, room);
      for (int r = 0; r < rows; ++r)
        s.words[packed.size() * static_cast<size_t>(rows) + static_cast<size_t>(r)] = reinterpret_cast<uint64_t>(
            views[bucket.rows[static_cast<size_t>(r)]].data + done * element_size(bucket.dtypes[static_cast<size_t>(r)]));
      total += static_cast<uint32_t>((pad + take + kGranule - 1) / kGranule);
      packed.push_back(total << 6 | static_cast<uint32_t>((pad + take - 1) % kGranule));
      done += take;
    }
  }
  flush();
}

inline StridedPiece make_strided(const Plan& plan, size_t p, const std::vector<int>& wanted) {
  const Piece& piece = plan.pieces[p];
  if (piece.ndim > kMaxDims)
    throw PlanError("gradproj: a buffer of " + std::to_string(piece.numel) + " elements needs " + std::to_string(piece.ndim) +
                    " dimensions after merging; the CUDA kernels take 8: make it contiguous");
  StridedPiece s{};
  s.numel = piece.numel;
  s.ndim = piece.ndim;
  for (int d = 0; d < piece.ndim; ++d) {
    s.sizes[d] = plan.sizes(piece)[d];
    s.inverse[d] = 1.0 / static_cast<double>(s.sizes[d]);
  }
  for (int r : wanted) {
    const RowView& v = plan.row_views(p)[r];
    if (!v.data) continue;
    for (int d = 0; d < piece.ndim; ++d) s.strides[s.rows][d] = plan.strides(piece, r)[d];
    s.address[s.rows] = v.data;
    s.info.id[s.rows] = static_cast<uint8_t>(r);
    s.info.dtype[s.rows] = static_cast<uint8_t>(v.dtype);
    ++s.rows;
  }
  return s;
}

// A grid that fills the device but never holds more warps than there are chunks of one granule.
inline int64_t blocks_for(int64_t granules, int64_t most) {
  return std::max<int64_t>(1, std::min(most, (granules + kWarps - 1) / kWarps));
}

// Granules per chunk: at most 32 (2,048 elements), and small enough that every warp of the grid gets one.
inline uint32_t chunk_for(uint32_t granules, int64_t blocks) {
  const int64_t per_warp = granules / (blocks * kWarps);
  return static_cast<uint32_t>(std::max<int64_t>(1, std::min<int64_t>(32, per_warp)));
}

}  // namespace gradproj::cuda

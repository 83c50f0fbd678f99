// Kernel parameters: the pieces of a plan, by value. Nothing is uploaded, so nothing has to be pinned, cached or kept alive,
// and a captured graph owns its copy.
//
// Elements are counted in granules of 64. A segment is a dense piece, padded in front so that its first granule starts on a
// 16-byte boundary of row 0 (the pad is masked, not read). Per segment: one address per row, and one 32-bit word with the
// cumulative count of granules in its upper 26 bits and the index of the last element within the last granule in its lower 6.
// At K = 1 that is 20 bytes: 1,600 segments in one launch; a launch covers up to 4.29e9 elements, larger plans take several.
// A base, the scales of a float8 row and parts cost their own bytes, and only where they are.
#pragma once

#include "../plan.h"
#include "runtime.h"

namespace gradproj::cuda {

constexpr int kGranule = 64;
constexpr uint32_t kMaxGranules = (1u << 26) - 1;

struct RowInfo {
  uint8_t id[kMaxRows];        // which of the rows that were asked for
  uint8_t dtype[kMaxBuffers];  // DType; behind those of the rows that of the base
  uint8_t scale[kMaxBuffers];  // f8: which of a segment's addresses is its scales'; otherwise 0
};

// kBytes: 4,096 everywhere; 32,764 with CUDA 12.1 and later on compute capability 7.0 and later.
template <int kBytes>
struct Segments {
  static constexpr int kHeader = 7 * 4 + static_cast<int>(sizeof(RowInfo)) + 7;
  static constexpr int kWords = (kBytes - kHeader - 64) / 8;  // 64: the kernels' other parameters
  static constexpr int kGroup = 32;                           // segments that share the number their parts are counted from
  // Addresses, `width` to a segment: of the rows, the base, the scales. Then the 32-bit words, two each. With parts, a byte
  // per segment and a 32-bit number per group, whose sum is the segment's part.
  uint64_t words[kWords];
  int32_t count;
  int32_t rows;
  int32_t width;
  int32_t base;        // index of its address; 0: row 0 is meant as it is
  int32_t parts;       // 0: all segments belong to one part
  uint32_t chunk;      // granules that a warp takes at a time
  uint32_t per_block;  // granules of a block, where blocks take contiguous ranges
  RowInfo info;

  static constexpr int capacity(int width, bool parts) {  // 24: each of the three arrays rounded up
    return static_cast<int>((int64_t{kWords} * 8 - 24) * kGroup / ((8 * width + 4) * kGroup + (parts ? kGroup + 4 : 0)));
  }
  __host__ __device__ uint32_t word32(int at, int i) const {  // the i-th of the 32-bit words from words[at] on
    const uint64_t two = words[at + (i >> 1)];
    return static_cast<uint32_t>(i & 1 ? two >> 32 : two);
  }
  __host__ __device__ uint32_t packed(int s) const { return word32(count * width, s); }
  __host__ __device__ uint32_t end(int s) const { return packed(s) >> 6; }
  __host__ __device__ uint32_t begin(int s) const { return s ? end(s - 1) : 0; }
  __host__ __device__ const char* address(int s, int r) const { return reinterpret_cast<const char*>(words[s * width + r]); }
  __host__ __device__ int32_t part(int s) const {
    const int bytes = count * width + (count + 1) / 2, bases = bytes + (count + 7) / 8;
    return static_cast<int32_t>(word32(bases, s / kGroup) + (word32(bytes, s >> 2) >> 8 * (s & 3) & 255u));
  }
  // The first segment for which `reached` is true; it is true of all that follow, and `count` if of none.
  template <typename F>
  __host__ __device__ int first(const F& reached) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (reached(middle))
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
  __host__ __device__ int first_at(uint32_t granule) const {
    return first([&](int s) { return end(s) > granule; });
  }
  __host__ __device__ int first_of(int32_t wanted) const {
    return first([&](int s) { return part(s) >= wanted; });
  }
};
using SmallSegments = Segments<4096>;
using LargeSegments = Segments<32764>;
static_assert(sizeof(SmallSegments) + 64 <= 4096, "kernel parameters hold 4,096 bytes");
static_assert(sizeof(LargeSegments) + 64 <= 32764, "kernel parameters hold 32,764 bytes");
static_assert(LargeSegments::capacity(2, false) >= 1600 && LargeSegments::capacity(2, true) >= 1500);
static_assert(SmallSegments::capacity(2 * kMaxBuffers, true) >= 1);

// One piece whose rows have no common dense order.
template <int kBuffers>
struct StridedPiece {
  int64_t numel;
  int64_t sizes[kMaxDims];
  double inverse[kMaxDims];             // 1 / sizes: a division on the device costs a call
  int64_t strides[kBuffers][kMaxDims];  // in elements
  const char* address[kBuffers];        // of the rows, and the base
  const float* scale[kBuffers];         // f8 only
  int32_t ndim;
  int32_t rows;
  int32_t base;  // as in Segments
  int32_t part;
  RowInfo info;
};
constexpr int kFewBuffers = 45;
using SmallStrided = StridedPiece<kFewBuffers>;
using LargeStrided = StridedPiece<kMaxBuffers>;
static_assert(sizeof(SmallStrided) + 64 <= 4096, "kernel parameters hold 4,096 bytes");
static_assert(sizeof(LargeStrided) + 64 <= 32764, "kernel parameters hold 32,764 bytes");

// All pieces that one kernel instance can take: the same rows present, of the same dtypes.
struct Bucket {
  std::vector<int> ids;        // which of the rows asked for are present
  std::vector<int> rows;       // what they are in the plan; the base is the last
  std::vector<DType> dtypes;   // of those
  bool base = false;           // row 0 is there and stands for base - row 0
  std::vector<size_t> pieces;  // dense ones, in the order of the plan

  // Addresses of a segment.
  int width() const { return static_cast<int>(dtypes.size() + std::count(dtypes.begin(), dtypes.end(), DType::f8)); }
  // Whether all rows lie in memory as one type that they are computed with as they are.
  bool uniform() const {
    return !base && dtypes[0] != DType::f8 &&
           std::all_of(dtypes.begin(), dtypes.end(), [&](DType t) { return t == dtypes[0]; });
  }
};

// Elements before row 0's first 16-byte boundary are counted from that boundary: how many elements to pad in front.
__host__ __device__ inline int front_pad(const char* address, int element_bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16) / element_bytes;
}

// Refuses what no kernel takes, before anything is launched.
inline void check_launchable(const Plan& plan, bool large_params) {
  if (plan.gram_rows() > kMaxRows)
    throw PlanError("gradproj: " + std::to_string(plan.gram_rows() - 1) + " directions; the CUDA kernels take up to 64");
  for (const Piece& piece : plan.pieces) {
    if (piece.ndim > kMaxDims)
      throw PlanError("gradproj: a buffer of " + std::to_string(piece.numel) + " elements needs " + std::to_string(piece.ndim) +
                      " dimensions after merging; the CUDA kernels take 8: make it contiguous");
    if (piece.ndim > 0 && plan.rows > kFewBuffers && !large_params)
      throw PlanError("gradproj: more than " + std::to_string(kFewBuffers) +
                      " rows of a strided buffer need CUDA 12.1: make it contiguous, or update the driver");
  }
}

// The dense pieces of a plan, restricted to the rows `wanted`, sorted into buckets. A piece in which none of them is present
// is left out.
inline std::vector<Bucket> make_buckets(const Plan& plan, const std::vector<int>& wanted) {
  std::vector<Bucket> buckets;
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    if (plan.pieces[p].ndim > 0) continue;
    const RowView* views = plan.row_views(p);
    Bucket key;
    auto put = [&](int row) {
      key.rows.push_back(row);
      key.dtypes.push_back(views[row].dtype);
    };
    for (size_t id = 0; id < wanted.size(); ++id) {
      if (!views[wanted[id]].data) continue;
      key.ids.push_back(static_cast<int>(id));
      put(wanted[id]);
    }
    if (key.ids.empty()) continue;
    key.base = plan.base && key.rows[0] == 0;
    if (key.base) put(plan.rows - 1);
    auto same = [&](const Bucket& b) { return b.ids == key.ids && b.base == key.base && b.dtypes == key.dtypes; };
    auto found = std::find_if(buckets.begin(), buckets.end(), same);
    if (found == buckets.end()) found = buckets.insert(buckets.end(), std::move(key));
    found->pieces.push_back(p);
  }
  return buckets;
}

// Calls f(segments, granules) for as many parameter blocks of size kBytes as the bucket's pieces need. A piece longer than a
// launch can count is cut at the border of a granule and of a block of scales.
template <int kBytes, typename F>
void for_each_batch(const Plan& plan, const Bucket& bucket, uint32_t granule_limit, const F& f) {
  using Batch = Segments<kBytes>;
  Batch s;
  const int rows = static_cast<int>(bucket.ids.size()), buffers = static_cast<int>(bucket.rows.size());
  s.rows = rows;
  s.width = bucket.width();
  s.base = bucket.base ? rows : 0;
  s.parts = plan.parts > 1;
  s.info = {};
  for (int r = 0; r < rows; ++r) s.info.id[r] = static_cast<uint8_t>(bucket.ids[static_cast<size_t>(r)]);
  for (int r = 0, scale = buffers; r < buffers; ++r) {
    s.info.dtype[r] = static_cast<uint8_t>(bucket.dtypes[static_cast<size_t>(r)]);
    if (bucket.dtypes[static_cast<size_t>(r)] == DType::f8) s.info.scale[r] = static_cast<uint8_t>(scale++);
  }
  const int capacity = Batch::capacity(s.width, s.parts);
  const int row0_bytes = static_cast<int>(element_size(bucket.dtypes[0]));
  std::vector<uint32_t> packed;
  std::vector<int32_t> parts;
  uint32_t total = 0;
  auto flush = [&] {
    if (packed.empty()) return;
    s.count = static_cast<int32_t>(packed.size());
    uint64_t* end = s.words + packed.size() * static_cast<size_t>(s.width);
    auto append = [&](size_t count, size_t per_word, const auto& value) {
      for (size_t i = 0; i < count; ++i) {
        if (i % per_word == 0) *end++ = 0;
        end[-1] |= static_cast<uint64_t>(value(i)) << i % per_word * (64 / per_word);
      }
    };
    append(packed.size(), 2, [&](size_t i) { return packed[i]; });
    if (s.parts) {
      auto group = [&](size_t i) { return static_cast<uint32_t>(parts[i / Batch::kGroup * Batch::kGroup]); };
      append(packed.size(), 8, [&](size_t i) { return static_cast<uint32_t>(parts[i]) - group(i); });
      append((packed.size() + Batch::kGroup - 1) / Batch::kGroup, 2, [&](size_t i) { return group(i * Batch::kGroup); });
    }
    f(s, total);
    packed.clear();
    parts.clear();
    total = 0;
  };
  auto fits = [&](int32_t part) {  // a part's distance from the first of its group, in a byte
    const size_t group = packed.size() / Batch::kGroup * Batch::kGroup;
    return static_cast<int>(packed.size()) < capacity && total < granule_limit &&
           (group == packed.size() || part - parts[group] < 256);
  };
  for (size_t p : bucket.pieces) {
    const RowView* views = plan.row_views(p);
    const Piece& piece = plan.pieces[p];
    for (int64_t done = 0; done < piece.numel;) {
      if (!fits(piece.part)) flush();
      const int pad = front_pad(views[bucket.rows[0]].data + done * row0_bytes, row0_bytes);
      int64_t take = int64_t{granule_limit - total} * kGranule - pad;
      if (take >= piece.numel - done)
        take = piece.numel - done;
      else if ((take = take / kScaleBlock * kScaleBlock) == 0) {
        flush();
        continue;
      }
      uint64_t* address = s.words + packed.size() * static_cast<size_t>(s.width);
      for (int r = 0; r < buffers; ++r) {
        const RowView& v = views[bucket.rows[static_cast<size_t>(r)]];
        address[r] = reinterpret_cast<uint64_t>(v.data + done * element_size(v.dtype));
        if (s.info.scale[r]) address[s.info.scale[r]] = reinterpret_cast<uint64_t>(v.scale + done / kScaleBlock);
      }
      total += static_cast<uint32_t>((pad + take + kGranule - 1) / kGranule);
      packed.push_back(total << 6 | static_cast<uint32_t>((pad + take - 1) % kGranule));
      parts.push_back(piece.part);
      done += take;
    }
  }
  flush();
}

// The same, with parameters as large as the pieces ask for and the device takes. f takes either size.
template <typename F>
void for_each_launch(const Plan& plan, const Bucket& bucket, bool large_params, const F& f) {
  const bool small = static_cast<int>(bucket.pieces.size()) <= SmallSegments::capacity(bucket.width(), plan.parts > 1);
  if (small || !large_params)
    for_each_batch<4096>(plan, bucket, kMaxGranules, f);
  else
    for_each_batch<32764>(plan, bucket, kMaxGranules, f);
}

// Strided piece p, those of the rows `wanted` that are present: at most kBuffers with the base. Row 0 comes first.
template <int kBuffers>
StridedPiece<kBuffers> make_strided(const Plan& plan, size_t p, const std::vector<int>& wanted) {
  const Piece& piece = plan.pieces[p];
  StridedPiece<kBuffers> s{};
  s.numel = piece.numel;
  s.ndim = piece.ndim;
  s.part = piece.part;
  for (int d = 0; d < piece.ndim; ++d) {
    s.sizes[d] = plan.sizes(piece)[d];
    s.inverse[d] = 1.0 / static_cast<double>(s.sizes[d]);
  }
  auto put = [&](int at, int row) {
    const RowView& v = plan.row_views(p)[row];
    for (int d = 0; d < piece.ndim; ++d) s.strides[at][d] = plan.strides(piece, row)[d];
    s.address[at] = v.data;
    s.scale[at] = v.scale;
    s.info.dtype[at] = static_cast<uint8_t>(v.dtype);
  };
  bool row0 = false;
  for (size_t id = 0; id < wanted.size(); ++id) {
    if (!plan.row_views(p)[wanted[id]].data) continue;
    put(s.rows, wanted[id]);
    s.info.id[s.rows++] = static_cast<uint8_t>(id);
    row0 = row0 || wanted[id] == 0;
  }
  if (plan.base && row0) {
    put(s.rows, plan.rows - 1);
    s.base = s.rows;
  }
  return s;
}

// A grid that fills the device but never holds more warps than there are chunks of one granule.
inline int64_t blocks_for(int64_t granules, int64_t most) {
  return std::max<int64_t>(1, std::min(most, (granules + kWarps - 1) / kWarps));
}

constexpr int kMostOfALane = 48;  // elements of a chunk: as many float32 products are added up before they are widened

// Granules per chunk: at most 24 (1,536 elements), and small enough that every warp of the grid gets one.
inline uint32_t chunk_for(uint32_t granules, int64_t blocks) {
  const int64_t per_warp = granules / (blocks * kWarps);
  return static_cast<uint32_t>(std::max<int64_t>(1, std::min<int64_t>(32 * kMostOfALane / kGranule, per_warp)));
}

}  // namespace gradproj::cuda

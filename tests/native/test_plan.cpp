// Unit tests of csrc/plan.h and csrc/overlap.h. Prints "N checks passed" or the first failure, and returns non-zero.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>

#include "overlap.h"

using namespace gradproj;

static int checks = 0;
#define CHECK(condition)                                                            \
  do {                                                                              \
    ++checks;                                                                       \
    if (!(condition)) {                                                             \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);           \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

template <typename F>
static bool refuses(F f) {
  try {
    f();
  } catch (const PlanError&) {
    return true;
  }
  return false;
}

struct Tensor {
  std::vector<int64_t> sizes, strides;
  int64_t address;
  DType dtype = DType::f32;

  Buffer buffer() const {
    Buffer b;
    b.data = reinterpret_cast<const char*>(static_cast<intptr_t>(address));
    b.sizes = sizes.data();
    b.strides = strides.data();
    b.ndim = static_cast<int32_t>(sizes.size());
    b.dtype = dtype;
    b.present = true;
    b.numel = 1;
    for (int64_t n : sizes) b.numel *= n;
    b.contiguous = true;
    int64_t expected = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      if (sizes[d] != 1 && strides[d] != expected) b.contiguous = false;
      expected *= sizes[d];
    }
    if (b.numel == 0) b.contiguous = true;
    return b;
  }
  std::set<int64_t> bytes() const {
    std::set<int64_t> all;
    int64_t total = 1;
    for (int64_t n : sizes) total *= n;
    for (int64_t i = 0; i < total; ++i) {
      int64_t index = i, offset = 0;
      for (size_t d = sizes.size(); d-- > 0;) {
        offset += index % sizes[d] * strides[d];
        index /= sizes[d];
      }
      for (int64_t k = 0; k < element_size(dtype); ++k) all.insert(address + offset * element_size(dtype) + k);
    }
    return all;
  }
};

static Tensor dense(std::vector<int64_t> sizes, int64_t address, DType dtype = DType::f32) {
  Tensor t{sizes, std::vector<int64_t>(sizes.size()), address, dtype};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    t.strides[d] = stride;
    stride *= sizes[d];
  }
  return t;
}

static Plan plan_of(const std::vector<Tensor>& tensors, int rows) {
  std::vector<Buffer> buffers;
  for (const Tensor& t : tensors) buffers.push_back(t.buffer());
  return make_plan(buffers, {rows});
}

// Sums follow segments, so which columns touch in memory must not show in them.
static void neighbours_stay_apart() {
  Plan p = plan_of({dense({4, 2}, 4096), dense({8}, 4128), dense({2}, 4160),  //
                    dense({4, 2}, 8192), dense({8}, 8224), dense({2}, 8256)},
                   2);
  CHECK(p.segments.size() == 3);
  CHECK(p.segments[0].numel == 8 && p.segments[1].numel == 8 && p.segments[2].numel == 2);
  CHECK(p.row_views(2)[1].data == reinterpret_cast<const char*>(8256));
}

static void empties_and_absent_rows() {
  Buffer none;
  std::vector<Tensor> t = {dense({0, 3}, 0), dense({3}, 4096), dense({}, 4108), dense({0}, 0)};
  std::vector<Buffer> buffers;
  for (const Tensor& x : t) buffers.push_back(x.buffer());
  Plan p = make_plan(buffers, {1});
  CHECK(p.segments.size() == 2 && p.segments[0].numel == 3);  // an empty tensor is no segment, in the last slot either
  std::vector<Buffer> two = {buffers[1], buffers[2], none, none};
  p = make_plan(two, {2});
  CHECK(p.segments.size() == 2 && p.row_views(0)[1].data == nullptr);
  two[3] = buffers[1];
  two[3].sizes = buffers[2].sizes;
  two[3].strides = buffers[2].strides;
  two[3].ndim = 0;
  two[3].numel = 1;
  CHECK(make_plan(two, {2}).segments.size() == 2);  // present in one column, absent in the other
  CHECK(make_plan({none, none}, {2}).segments.empty());
  CHECK(make_plan({}, {1}).segments.empty());
}

static void strided_segments() {
  // Channels-last in both rows is dense; against a contiguous row it is not.
  Tensor last{{2, 3, 4, 5}, {60, 1, 15, 3}, 4096};
  CHECK(plan_of({last, {{2, 3, 4, 5}, {60, 1, 15, 3}, 8192}}, 2).segments[0].ndim == 0);
  Plan p = plan_of({last, dense({2, 3, 4, 5}, 8192)}, 2);
  CHECK(p.segments.size() == 1 && p.segments[0].ndim == 3);
  const Segment& segment = p.segments[0];
  CHECK(p.sizes(segment)[0] == 2 && p.sizes(segment)[1] == 20 && p.sizes(segment)[2] == 3);
  CHECK(p.strides(segment, 0)[0] == 60 && p.strides(segment, 0)[1] == 3 && p.strides(segment, 0)[2] == 1);
  CHECK(p.strides(segment, 1)[0] == 60 && p.strides(segment, 1)[1] == 1 && p.strides(segment, 1)[2] == 20);
  // Size-1 dimensions say nothing, whatever their stride.
  CHECK(plan_of({{{1, 7, 1}, {99, 1, 5}, 4096}}, 1).segments[0].ndim == 0);
  // Every second element: one dimension, but not of stride 1.
  CHECK(plan_of({{{6}, {2}, 4096}}, 1).segments[0].ndim == 1);
}

static void large_counts() {
  const int64_t huge = int64_t{3} << 31;
  Plan p = plan_of({dense({huge}, 4096, DType::bf16), dense({2, huge}, 4096 + 2 * huge, DType::bf16)}, 1);
  CHECK(p.segments.size() == 2 && p.segments[1].numel == 2 * huge);
}

static void refusals() {
  CHECK(refuses([] { plan_of({dense({2, 3}, 4096), dense({3, 2}, 8192)}, 2); }));
  CHECK(refuses([] { plan_of({dense({6}, 4096), dense({2, 3}, 8192)}, 2); }));
  CHECK(refuses([] { plan_of({dense({6}, 4096), dense({6}, 8192), dense({6}, 9000)}, 2); }));
  CHECK(refuses([] { make_plan({}, {0}); }));
}

static void parts() {
  std::vector<Tensor> t = {dense({4}, 4096), dense({4}, 4112), dense({4}, 4128), dense({4}, 4144)};
  std::vector<Buffer> buffers;
  for (const Tensor& x : t) buffers.push_back(x.buffer());
  // Segments are in the order of parts, columns of one part in theirs.
  Plan p = make_plan(buffers, {1, {1, 1, 0, 1}, 3});
  CHECK(p.parts == 3 && p.segments.size() == 4);
  for (size_t s = 0; s < 4; ++s) {
    const size_t column[] = {2, 0, 1, 3};
    CHECK(p.segments[s].part == (s > 0) && p.row_views(s)[0].data == buffers[column[s]].data);
  }
  CHECK(refuses([&] { make_plan(buffers, {1, {0, 0, 0}, 1}); }));     // a column without a part
  CHECK(refuses([&] { make_plan(buffers, {1, {0, 0, 0, 1}, 1}); }));  // a part that does not exist
  CHECK(refuses([&] { make_plan(buffers, {1, {0, 0, 0, -1}, 1}); }));
}

// Random small views in a small arena: the verdict of check_writable must be that of the sets of bytes.
static void overlap_is_exact() {
  std::mt19937 rng(7);
  auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  int refused = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    std::vector<Tensor> t(2);
    for (Tensor& x : t) {
      const int ndim = pick(0, 3);
      for (int d = 0; d < ndim; ++d) {
        x.sizes.push_back(pick(1, 3));
        x.strides.push_back(pick(1, 7));
      }
      x.dtype = pick(0, 1) ? DType::f32 : DType::bf16;
      x.address = 4096 + 2 * pick(0, 30);
    }
    const Buffer a = t[0].buffer(), b = t[1].buffer();
    if (!detail::nested(a) || !detail::nested(b)) continue;
    const auto x = t[0].bytes(), y = t[1].bytes();
    CHECK(static_cast<int64_t>(x.size()) == a.numel * element_size(a.dtype));  // nested means: no element twice
    bool shared = false;
    for (int64_t byte : x) shared = shared || y.count(byte);
    CHECK(detail::share_memory(a, b) == shared);
    const bool verdict = refuses([&] { check_writable({a, b}, 1); });
    CHECK(verdict == shared);
    refused += verdict;
  }
  CHECK(refused > 1000);
}

static void writable() {
  auto check = [](const std::vector<Tensor>& t, int rows) {
    std::vector<Buffer> buffers;
    for (const Tensor& x : t) buffers.push_back(x.buffer());
    return refuses([&] { check_writable(buffers, rows); });
  };
  const Tensor g = dense({8}, 4096), d = dense({8}, 8192);
  CHECK(!check({g, d}, 2));
  CHECK(!check({g, g}, 2));                                  // the direction is the gradient
  CHECK(check({g, g}, 1));                                   // the same gradient twice
  CHECK(check({g, dense({8}, 4100)}, 2));                    // shifted by an element
  CHECK(check({g, dense({8}, 4096, DType::f16)}, 2));        // the same address, another dtype
  CHECK(check({g, d, d, g}, 2));                             // another parameter's direction
  CHECK(!check({g, d, dense({8}, 4128), dense({8}, 16000)}, 2));
  CHECK(check({{{4, 3}, {0, 1}, 4096}}, 1));                 // expanded
  CHECK(!check({g, {{8}, {0}, 8192}}, 2));                   // an expanded direction is read only
  CHECK(!check({dense({0}, 4096), dense({0}, 4096)}, 1));
  // A long span in front must not hide an overlap further back.
  CHECK(check({{{2}, {1000}, 4096}, dense({2}, 4200), dense({2}, 4300), dense({2}, 4304)}, 1));
}

int main() {
  neighbours_stay_apart();
  empties_and_absent_rows();
  strided_segments();
  large_counts();
  refusals();
  parts();
  overlap_is_exact();
  writable();
  std::printf("%d checks passed\n", checks);
}

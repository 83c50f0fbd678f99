// Vectors, and the loops around them. Part of tile_impl.h.

// Before loops of constant length over arrays that are to live in registers: gcc leaves an array in memory if it keeps one loop.
#if defined(__clang__)
#define GRADPROJ_UNROLL _Pragma("unroll")
#else
#define GRADPROJ_UNROLL _Pragma("GCC unroll 16")
#endif

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

template <typename T>
struct Vector {
  static constexpr int kWidth = GRADPROJ_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(GRADPROJ_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef T unaligned_for_2 __attribute__((vector_size(GRADPROJ_VECTOR_BYTES), aligned(2), may_alias));
};

// Adds a vector's lanes to kLanes float64 sums, lane l to sum l modulo kLanes: the order depends on the vector's
// width alone.
template <typename T>
inline void flush(typename Vector<T>::type v, double* acc) {
  constexpr int kStep = Vector<double>::kWidth;
  typedef T part __attribute__((vector_size(kStep * sizeof(T)), may_alias));
  GRADPROJ_UNROLL for (int l = 0; l < Vector<T>::kWidth; l += kStep)
    *reinterpret_cast<Vector<double>::unaligned*>(acc + l % kLanes) +=
        __builtin_convertvector(reinterpret_cast<const part*>(&v)[l / kStep], Vector<double>::type);
}

// With many rows a tile of each is about a page, and the processor's own prefetcher starts anew on every page: whoever touches
// a row first asks for what it will need next. Past the end of a buffer a prefetch does nothing.
template <typename S>
inline void prefetch(const S* p) {
  __builtin_prefetch(p, 0, 2);
}

// f(i, count) for one cache line of s after the other, asking for the line that the next tile will want: with many rows the
// processor's own prefetcher does not keep up. All counts but the last are the same constant.
template <typename S, typename F>
inline void in_lines(const S* s, int64_t n, const F& f) {
  constexpr int64_t kLine = 64 / sizeof(S);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    prefetch(s + i + kTile);
    f(i, kLine);
  }
  f(i, n - i);
}

// Calls f with n, 1 to kMost, as a compile-time count.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int kMost, typename F>
inline void with_count(int n, const F& f) {
  if constexpr (kMost > 1)
    if (n < kMost) return with_count<kMost - 1>(n, f);
  f(Count<kMost>{});
}

}  // namespace
}  // namespace gradproj::cpu::GRADPROJ_ISA

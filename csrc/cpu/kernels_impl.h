// Included by kernels_portable.cpp, kernels_avx2.cpp and kernels_avx512.cpp, each with its own GRADPROJ_ISA,
// GRADPROJ_VECTOR_BYTES and, on x86, GRADPROJ_TARGET. Vectors are the compiler's vector extension, so one source serves
// every processor. Beyond 16 bytes they are x86's, with f16c's conversions; compilers do not agree on defining __F16C__
// inside a pragma. After that pragma nothing may be included that defines inline functions: the linker would keep one
// instruction set's copy for all.

#ifdef GRADPROJ_TARGET
#include <immintrin.h>
#endif

#include "kernels.h"

#define GRADPROJ_PRAGMA(text) _Pragma(#text)
#define GRADPROJ_PRAGMA_OF(text) GRADPROJ_PRAGMA(text)
#if defined(GRADPROJ_TARGET) && defined(__clang__)
GRADPROJ_PRAGMA_OF(clang attribute push(__attribute__((target(GRADPROJ_TARGET))), apply_to = function))
#elif defined(GRADPROJ_TARGET)
#pragma GCC push_options
GRADPROJ_PRAGMA_OF(GCC target(GRADPROJ_TARGET))
#endif

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

#include "vector.h"

#include "combine_kernel.h"
#include "convert_kernel.h"
#include "gram_kernel.h"

template <typename T, typename G, typename S>
constexpr RowKernels row_kernels() {
  return {gram<T, G, S>, combine<T, G, S>, !std::is_same_v<G, S>};
}

constexpr Kernels table = {
    .f32 = row_kernels<float, float, float>(),
    .f64 = row_kernels<double, double, double>(),
    .bf16 = row_kernels<float, BF16, BF16>(),
    .f32_with_bf16 = row_kernels<float, float, BF16>(),
    .f32_with_f16 = row_kernels<float, float, F16>(),
    .to_f32 = {load<float>, store<float>},
    .to_f64 = {load<double>, store<double>},
    .block = kBlock,
};

}  // namespace

const Kernels& kernels() { return table; }

}  // namespace gradproj::cpu::GRADPROJ_ISA

#if defined(GRADPROJ_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(GRADPROJ_TARGET)
#pragma GCC pop_options
#endif

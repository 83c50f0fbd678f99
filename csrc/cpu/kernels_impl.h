// Included by kernels_portable.cpp, kernels_avx2.cpp and kernels_avx512.cpp, each under its own target and with its own
// GRADPROJ_ISA and GRADPROJ_VECTOR_BYTES. Vectors are the compiler's vector extension, so one source serves every
// processor.
// Beyond 16 bytes they are x86's, with f16c's conversions; compilers do not agree on telling so by __F16C__ inside a
// pragma.
// No header that defines inline functions may be included from here: the linker would keep one instruction set's copy
// for all.

#include "vector.h"

#include "combine_kernel.h"
#include "convert_kernel.h"
#include "gram_kernel.h"

namespace gradproj::cpu::GRADPROJ_ISA {
namespace {

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
}  // namespace gradproj::cpu::GRADPROJ_ISA

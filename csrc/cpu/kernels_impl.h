// Included by kernels_portable.cpp, kernels_avx2.cpp and kernels_avx512.cpp, each under its own target and with its own
// GRADPROJ_ISA and GRADPROJ_VECTOR_BYTES. Vectors are the compiler's vector extension, so one source serves every processor.
// Beyond 16 bytes they are x86's, with f16c's conversions; compilers do not agree on telling so by __F16C__ inside a pragma.
// No header that defines inline functions may be included from here: the linker would keep one instruction set's copy for all.

#include "vector.h"

#include "combine_kernel.h"
#include "convert_kernel.h"
#include "gram_kernel.h"

#define GRADPROJ_DEFINE_KERNELS(function)                                                                         \
  namespace gradproj::cpu {                                                                                       \
  const Kernels& function() {                                                                                     \
    using namespace GRADPROJ_ISA;                                                                                 \
    static constexpr Kernels table = {{gram<float, float, float>, combine<float, float, float>},                  \
                                      {gram<double, double, double>, combine<double, double, double>},            \
                                      {gram<float, BF16, BF16>, combine<float, BF16, BF16>},                      \
                                      {gram<float, float, BF16>, combine<float, float, BF16>},                    \
                                      {gram<float, float, F16>, combine<float, float, F16>},                      \
                                      {load<float>, store<float>},                                                \
                                      {load<double>, store<double>}};                                             \
    return table;                                                                                                 \
  }                                                                                                               \
  }

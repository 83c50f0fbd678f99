// Included by tile_portable.cpp, tile_avx2.cpp and tile_avx512.cpp, each under its own target and with its own
// GRADPROJ_ISA and GRADPROJ_VECTOR_BYTES. Vectors are the compiler's vector extension, so one source serves every processor.
// Beyond 16 bytes they are x86's, with f16c's conversions; compilers do not agree on telling so by __F16C__ inside a pragma.
// No header that defines inline functions may be included from here: the linker would keep one instruction set's copy for all.

#include "tile_vector.h"

#include "tile_decode.h"

#include "tile_combine.h"
#include "tile_convert.h"
#include "tile_gram.h"

#define GRADPROJ_QUOTE_(x) #x
#define GRADPROJ_QUOTE(x) GRADPROJ_QUOTE_(x)
#define GRADPROJ_DEFINE_KERNELS(function)                                                              \
  namespace gradproj::cpu {                                                                            \
  const Kernels& function() {                                                                          \
    using namespace GRADPROJ_ISA;                                                                      \
    static constexpr Kernels table = {{gram<float, float>, combine<float, float>},                     \
                                      {gram<double, double>, combine<double, double>},                 \
                                      {gram<float, BF16>, combine<float, BF16>},                       \
                                      {mixed_products<BF16>, mixed_combine<BF16>},                   \
                                      {mixed_products<F16>, mixed_combine<F16>},                     \
                                      {load_tile<float>, store_tile<float>},                           \
                                      {load_tile<double>, store_tile<double>},                         \
                                      GRADPROJ_QUOTE(GRADPROJ_ISA)};                                   \
    return table;                                                                                      \
  }                                                                                                    \
  }

#include "kernels.h"

#define GRADPROJ_ISA portable
#define GRADPROJ_VECTOR_BYTES 16
#include "kernels_impl.h"

namespace gradproj::cpu {
const Kernels& portable_kernels() { return portable::table; }
}  // namespace gradproj::cpu

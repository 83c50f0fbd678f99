#include "kernels.h"

#define GRADPROJ_ISA portable
#define GRADPROJ_VECTOR_BYTES 16
#include "kernels_impl.h"
GRADPROJ_DEFINE_KERNELS(portable_kernels)

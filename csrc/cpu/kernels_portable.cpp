#define GRADPROJ_ISA portable
#define GRADPROJ_VECTOR_BYTES 16
#include "kernels_impl.h"

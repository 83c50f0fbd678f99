#if defined(__x86_64__)
#define GRADPROJ_ISA avx2
#define GRADPROJ_VECTOR_BYTES 32
#define GRADPROJ_TARGET "avx2,fma,f16c"
#include "kernels_impl.h"
#endif

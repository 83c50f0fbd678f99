#if defined(__x86_64__)
#define GRADPROJ_ISA avx512
#define GRADPROJ_VECTOR_BYTES 64
#define GRADPROJ_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "kernels_impl.h"
#endif

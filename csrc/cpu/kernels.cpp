#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace gradproj::cpu {
namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("GRADPROJ_CPU");
  auto allowed = [&](const char* name) { return !wanted || !*wanted || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::kernels();
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return avx2::kernels();
#endif
  if (allowed("portable")) return portable::kernels();
  throw PlanError(std::string("gradproj: GRADPROJ_CPU=") + wanted + " is unknown or not supported by this processor");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gradproj::cpu

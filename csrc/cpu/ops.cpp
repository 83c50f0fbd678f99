#include "context.h"

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { gradproj::Ops<gradproj::cpu::Context>::implement(m); }

#pragma once

#include "../weights.h"

namespace gradproj::cpu {

// Weights of every part: gram[parts x R x R] -> weights[parts x R]. Parts are solved by torch's threads, one each, once there
// is more work than handing it out costs; the result does not depend on how many there are.
void solve_parts(Rule rule, const double* gram, int64_t parts, int R, double* weights);

}  // namespace gradproj::cpu

#pragma once

#include "../plan.h"

namespace gradproj::cpu {

// Row 0 <- sum_r weights[part][r] row r, rounded once. Reads the rows whose weight is not 0, writes N bytes; weights
// (1, 0, .., 0) of a part touch nothing in it. weights: [parts x R].
void combine(const Plan& plan, const double* weights);

}  // namespace gradproj::cpu

#pragma once

#include "../plan.h"

namespace gradproj::cpu {

// Row 0 <- sum_r weights[part][r] row r, rounded once; with a base, row 0 <- base - sum, where row 0 counts as base - row 0. Reads the rows whose weight is not 0, writes N bytes; weights (1, 0, .., 0)
// read and write nothing. Walks backwards: the tail of what a Gram pass read is still in cache.
void combine(const Plan& plan, const double* weights);

}  // namespace gradproj::cpu

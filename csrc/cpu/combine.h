#pragma once

#include "../plan.h"

namespace gradproj::cpu {

// Row 0 <- sum_r weights[r] row r, rounded once. Reads the rows whose weight is not 0, writes N bytes; weights (1, 0, .., 0)
// read and write nothing. Walks backwards: the tail of what a Gram pass read is still in cache.
void combine(const Plan& plan, const double* weights);

}  // namespace gradproj::cpu

#pragma once

#include "../plan.h"

namespace gradproj::cpu {

// The rows' inner products into gram [parts x R x R], symmetric. gram_dd: the Gram of rows 1.., copied instead of computed, or
// null. Reads R N bytes once; sums float32 products (float64 for float64 rows) in float64, in an order that the plan fixes.
void gram(const Plan& plan, const double* gram_dd, double* gram);

}  // namespace gradproj::cpu

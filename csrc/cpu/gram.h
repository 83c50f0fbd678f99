#pragma once

#include "../plan.h"

namespace gradproj::cpu {

// The rows' inner products into gram[parts x R x R], symmetric. known: the Gram of rows 1.., or null; then only row 0 is
// computed. Reads R N bytes once; order of summation fixed by the plan: same buffers, same bits, any thread count.
void gram(const Plan& plan, const double* known, double* gram);

}  // namespace gradproj::cpu

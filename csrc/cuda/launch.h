// Every operation as host code that checks, and then launches on a stream. Nothing waits for the device. Each function
// refuses what it cannot do (PlanError) before its first launch.
#pragma once

#include "../plan.h"
#include "../weights.h"
#include "runtime.h"

namespace gradproj::cuda {

inline void check_rows(int rows) {
  if (rows > kMaxRows)
    throw PlanError("gradproj: " + std::to_string(rows - 1) + " directions; the CUDA kernels take up to " +
                    std::to_string(kMaxRows - 1));
}

// Doubles of scratch that the Gram of a plan needs.
int64_t gram_scratch(const Device& device, const Plan& plan);

// The Gram of every part into gram [parts, R, R]. gram_dd: [parts, R - 1, R - 1] of the directions, copied instead of
// computed, or null.
void launch_gram(const Device& device, const Plan& plan, const double* gram_dd, double* scratch, double* gram);

// A plan of two rows and one part: its three products stay in scratch, as partial sums in slots. Returns their number.
int32_t launch_gram_slots(const Device& device, const Plan& plan, double* scratch);

// Gram [parts, R, R] -> weights [parts, R].
void launch_weights(const Device& device, Rule rule, const double* gram, int64_t parts, int R, double* weights);

// Where combine finds its weights. count == 0: in `weights` [parts, R]. Otherwise there are two rows and one part, and
// launch_gram_slots has just left `count` slots: every block adds them up for itself (a few thousand doubles out of L2)
// and applies the rule, so that nothing has to run between the two passes; block 0 also writes the Gram [2, 2] and the
// weights [2].
struct WeightSource {
  double* weights;  // only read if count is 0
  const double* slots;
  double* gram;
  Rule rule;
  int32_t count;
};

// Row 0 of every part from its weights.
void launch_combine(const Device& device, const Plan& plan, const WeightSource& source);

// Gram, weights, and combine.
void launch_project(const Device& device, const Plan& plan, Rule rule, const double* gram_dd, double* scratch,
                    double* gram, double* weights);

}  // namespace gradproj::cuda

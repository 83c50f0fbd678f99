// What one file of csrc/cuda calls of another: every operation as host code that checks, and then launches on a stream.
// Nothing waits for the device. Each function refuses what it cannot do (PlanError) before its first launch.
#pragma once

#include "../plan.h"
#include "../weights.h"
#include "runtime.h"

namespace gradproj::cuda {

// Doubles of scratch that the Gram of a plan needs.
int64_t gram_scratch(const Device& device, const Plan& plan);

// The Gram of every part into gram [parts, R, R]. gram_dd: [parts, R - 1, R - 1] of the directions, copied instead of
// computed, or null.
void launch_gram(const Device& device, const Plan& plan, const double* gram_dd, double* scratch, double* gram);

// A plan of two rows and one part: their three products stay in scratch, as so many partial sums each. Returns how
// many.
int32_t launch_gram_slots(const Device& device, const Plan& plan, double* scratch);

// Gram [parts, R, R] -> weights [parts, R].
void launch_weights(const Device& device, Rule rule, const double* gram, int64_t parts, int R, double* weights);

// Row 0 of every part from weights [parts, R].
void launch_combine(const Device& device, const Plan& plan, const double* weights);

// The same from what launch_gram_slots has left; also writes the Gram [2, 2] and the weights [2].
void launch_combine_slots(const Device& device, const Plan& plan, Rule rule, const double* slots, int32_t count, double* gram,
                          double* weights);

// Gram, weights, and combine.
void launch_project(const Device& device, const Plan& plan, Rule rule, const double* gram_dd, double* scratch, double* gram,
                    double* weights);

}  // namespace gradproj::cuda

// The CPU's side of ../ops.h. Each step is described where it is defined.
#pragma once

#include "../ops.h"

namespace gradproj::cpu {

struct Context {
  explicit Context(Place) {}
  static void gram(const Plan& plan, const double* gram_dd, double* gram);
  static void weights(Rule rule, const double* gram, int64_t parts, int R, double* weights);
  static void combine(const Plan& plan, const double* weights);
  // Moves (R + R + 1) N bytes: 5 N for one direction.
  static void project(const Plan& plan, Rule rule, const double* gram_dd, double* gram, double* weights) {
    Context::gram(plan, gram_dd, gram);
    Context::weights(rule, gram, plan.parts, plan.rows, weights);
    combine(plan, weights);
  }
};

}  // namespace gradproj::cpu

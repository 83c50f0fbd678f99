// Gram -> weights, for host and device alike: step 3 of the algorithm, a few hundred numbers.
//
// G is the R x R float64 Gram of row 0 (the gradient g) and rows 1..R-1 (the directions d_k). w[0] scales g, w[k] scales d_k.
// A non-finite G, or nothing to remove, gives exactly (1, 0, .., 0), which combine leaves bitwise untouched.
// Both solvers work on cosines, C = S G_dd S with S = diag(G_dd)^-1/2, so the length of a direction changes nothing; a
// direction of length 0 gets weight 0. A direction whose part outside the span of the others is shorter than
// sqrt(kRankTolerance) of itself is dependent: the float32 products behind G cannot resolve less.
// python/gradproj/methods.py holds the same rules in torch operations.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GRADPROJ_HD __host__ __device__
#else
#define GRADPROJ_HD
#endif

namespace gradproj {

enum class Method : int32_t { orthogonal, conflict, mix };

struct Rule {
  Method method;
  double gamma;  // mix: weight of every direction
  double eps;    // added to every <d_k, d_k>; 0 is scale-free
};

constexpr double kRankTolerance = 1e-8;

// Doubles of scratch that solve_weights needs for R rows.
GRADPROJ_HD constexpr int64_t weights_scratch(int R) { return 2LL * (R - 1) * (R - 1) + 7LL * (R - 1) + 1; }

// K = 1 in closed form; no scratch.
GRADPROJ_HD inline void solve_weights_k1(Rule rule, double gg, double gd, double dd, double* w) {
  w[0] = 1.0;
  w[1] = 0.0;
  if (!std::isfinite(gg) || !std::isfinite(gd) || !std::isfinite(dd)) return;
  if (rule.method == Method::mix) {
    w[1] = rule.gamma;
    return;
  }
  double length2 = dd + rule.eps;
  if (length2 <= 0.0 || (rule.method == Method::conflict && gd >= 0.0)) return;
  w[1] = -gd / length2;
}

namespace detail {

// Cholesky with diagonal pivoting on the chosen rows of C; solves C_PP x = b_P, x = 0 for rows found dependent.
// L: K x K scratch. order, left: K scratch each. Reads C and b, writes x.
GRADPROJ_HD inline void pivoted_solve(const double* C, int K, const double* b, const double* chosen, double* L, double* order,
                                      double* left, double* x) {
  int rank = 0, count = 0;
  for (int k = 0; k < K; ++k) {
    x[k] = 0.0;
    if (chosen[k] != 0.0) {
      order[count] = k;
      left[count] = C[k * K + k];
      ++count;
    }
  }
  for (; rank < count; ++rank) {
    int best = rank;
    for (int i = rank + 1; i < count; ++i)
      if (left[i] > left[best]) best = i;
    if (left[best] <= kRankTolerance) break;
    double t = order[rank];
    order[rank] = order[best];
    order[best] = t;
    t = left[rank];
    left[rank] = left[best];
    left[best] = t;
    for (int j = 0; j < rank; ++j) {
      t = L[rank * K + j];
      L[rank * K + j] = L[best * K + j];
      L[best * K + j] = t;
    }
    const double pivot = sqrt(left[rank]);
    L[rank * K + rank] = pivot;
    const int p = static_cast<int>(order[rank]);
    for (int i = rank + 1; i < count; ++i) {
      double value = C[static_cast<int>(order[i]) * K + p];
      for (int j = 0; j < rank; ++j) value -= L[i * K + j] * L[rank * K + j];
      L[i * K + rank] = value / pivot;
      left[i] -= L[i * K + rank] * L[i * K + rank];
    }
  }
  // left is free now: the intermediate of the two triangular solves.
  for (int i = 0; i < rank; ++i) {
    double value = b[static_cast<int>(order[i])];
    for (int j = 0; j < i; ++j) value -= L[i * K + j] * left[j];
    left[i] = value / L[i * K + i];
  }
  for (int i = rank - 1; i >= 0; --i) {
    double value = left[i];
    for (int j = i + 1; j < rank; ++j) value -= L[j * K + i] * left[j];
    left[i] = value / L[i * K + i];
    x[static_cast<int>(order[i])] = left[i];
  }
}

}  // namespace detail

// w: R doubles. scratch: weights_scratch(R) doubles.
// orthogonal: w_d = -pinv(G_dd) G_dg on the independent directions.
// conflict: nearest g' with <g', d_k> >= 0 for all k; w_d >= 0 minimises |g + sum_k w_k d_k| (Lopez-Paz & Ranzato 2017, GEM)
// by the active-set method of Lawson & Hanson 1974, chapter 23.
GRADPROJ_HD inline void solve_weights(Rule rule, const double* G, int R, double* w, double* scratch) {
  const int K = R - 1;
  if (K == 1) return solve_weights_k1(rule, G[0], G[1], G[3], w);
  w[0] = 1.0;
  for (int k = 0; k < K; ++k) w[1 + k] = 0.0;
  for (int i = 0; i < R * R; ++i)
    if (!std::isfinite(G[i])) return;
  if (rule.method == Method::mix) {
    for (int k = 0; k < K; ++k) w[1 + k] = rule.gamma;
    return;
  }
  double* C = scratch;
  double* L = C + K * K;
  double* b = L + K * K;  // -S G_dg: what has to be made up for
  double* chosen = b + K;
  double* order = chosen + K;
  double* left = order + K;
  double* x = left + K;
  double* s = x + K;
  double* refused = s + K;  // dependent on the chosen rows: no use asking again until those change
  for (int k = 0; k < K; ++k) {
    const double length2 = G[(k + 1) * R + k + 1] + rule.eps;
    s[k] = length2 > 0.0 ? 1.0 / sqrt(length2) : 0.0;
  }
  for (int k = 0; k < K; ++k) {
    b[k] = -G[(k + 1) * R] * s[k];
    for (int l = 0; l < K; ++l) C[k * K + l] = (G[(k + 1) * R + l + 1] + (k == l ? rule.eps : 0.0)) * s[k] * s[l];
    chosen[k] = rule.method == Method::orthogonal && s[k] > 0.0 ? 1.0 : 0.0;
    refused[k] = 0.0;
  }
  if (rule.method == Method::orthogonal) {
    detail::pivoted_solve(C, K, b, chosen, L, order, left, x);
    for (int k = 0; k < K; ++k) w[1 + k] = x[k] * s[k];
    return;
  }

  // gradient of the dual at lambda: b - C lambda; positive means that d_k is still conflicted with.
  double* lambda = w + 1;
  const double slack = 1e-12 * sqrt(G[0]);  // of |g|: b is in units of |g|
  for (int iteration = 0; iteration < 3 * K + 1; ++iteration) {
    int worst = -1;
    double most = slack;
    for (int k = 0; k < K; ++k) {
      if (chosen[k] != 0.0 || refused[k] != 0.0 || s[k] == 0.0) continue;
      double value = b[k];
      for (int l = 0; l < K; ++l) value -= C[k * K + l] * lambda[l];
      if (value > most) {
        most = value;
        worst = k;
      }
    }
    if (worst < 0) break;
    chosen[worst] = 1.0;
    bool entered = true;
    for (;;) {
      detail::pivoted_solve(C, K, b, chosen, L, order, left, x);
      double step = 1.0;
      int blocking = -1;
      for (int k = 0; k < K; ++k) {
        if (chosen[k] == 0.0 || x[k] > 0.0) continue;
        const double fraction = lambda[k] <= 0.0 ? 0.0 : lambda[k] / (lambda[k] - x[k]);
        if (blocking < 0 || fraction < step) {
          step = fraction;
          blocking = k;
        }
      }
      if (blocking < 0) {
        for (int k = 0; k < K; ++k) lambda[k] = x[k];
        break;
      }
      for (int k = 0; k < K; ++k)
        if (chosen[k] != 0.0) lambda[k] += step * (x[k] - lambda[k]);
      for (int k = 0; k < K; ++k)
        if (chosen[k] != 0.0 && (k == blocking || lambda[k] <= 0.0)) {
          entered = entered && k != worst;
          chosen[k] = 0.0;
          lambda[k] = 0.0;
        }
      bool any = false;
      for (int k = 0; k < K; ++k) any = any || chosen[k] != 0.0;
      if (!any) break;
    }
    for (int k = 0; k < K; ++k)
      if (entered) refused[k] = 0.0;
    if (!entered) refused[worst] = 1.0;
  }
  for (int k = 0; k < K; ++k) lambda[k] *= s[k];
}

}  // namespace gradproj

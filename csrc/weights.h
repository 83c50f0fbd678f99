// Gram -> weights, for host and device alike: step 3 of the algorithm, a few thousand numbers.
//
// G is the R x R float64 Gram of row 0 (the gradient g) and rows 1..R-1 (the directions d_k). w[0] scales g, w[k]
// scales d_k. A non-finite G gives exactly (1, 0, .., 0), with which combine leaves g bitwise untouched.
//
// "orthogonal" and "conflict" work on cosines, C = S G_dd S with S = diag(G_dd)^-1/2, so the length of a direction
// changes nothing; a direction of length 0 gets weight 0. Both keep one symmetric tableau and sweep it (Goodnight 1979;
// principal pivoting): to take direction p into the active set P, or out of it, is one rank-one update of [C b; b' 0].
// Swept on P it is
//
//     [ -inv(C_PP)            inv(C_PP) C_PN                        inv(C_PP) b_P = x             ]
//     [       .       C_NN - C_NP inv(C_PP) C_PN           b_N - C_NP x, what is left of b         ]
//
// so its diagonal says who is in P (there it is <= -1) and what the others have outside the span of P (squared sines,
// >= 0), and its last column holds the solution on P and the residual elsewhere. A direction with a squared sine of at
// most kRankTolerance counts as dependent: the float32 products in G cannot resolve less.
// python/gradproj/kernels/methods.py and triton_kernels/weights.py hold the same rules.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GRADPROJ_HD __host__ __device__
#else
#define GRADPROJ_HD
#endif

namespace gradproj {

enum class Method : int32_t { orthogonal, conflict, mix, pcgrad };

struct Rule {
  Method method;
  double gamma;  // mix: weight of every direction
  double eps;    // added to every squared length that something is divided by; 0 is scale-free
};

constexpr double kRankTolerance = 1e-8;

// Doubles of scratch that solve_weights needs for R rows.
GRADPROJ_HD constexpr int64_t weights_scratch(int R) { return (int64_t{R} + 3) * R; }

// The threads that solve one system together, as a grid of rows x columns. On the host: one.
struct Alone {
  static constexpr int row = 0, rows = 1, column = 0, columns = 1;
  GRADPROJ_HD void sync() const {}
};

// K = 1 in closed form; no scratch.
GRADPROJ_HD inline void solve_weights_k1(Rule rule, double gg, double gd, double dd, double* w) {
  w[0] = 1.0;
  w[1] = 0.0;
  if (!std::isfinite(gg) || !std::isfinite(gd) || !std::isfinite(dd)) return;
  if (rule.method == Method::mix) {
    w[1] = rule.gamma;
    return;
  }
  if (rule.method == Method::pcgrad) {
    w[0] = gd < 0.0 ? 1.0 - gd / (gg + rule.eps) : 1.0;
    w[1] = gd < 0.0 ? 1.0 - gd / (dd + rule.eps) : 1.0;
    return;
  }
  double length2 = dd + rule.eps;
  if (length2 <= 0.0 || (rule.method == Method::conflict && gd >= 0.0)) return;
  w[1] = -gd / length2;
}

namespace detail {

// Splits `for i < n` among the threads of a team.
template <typename Team, typename F>
GRADPROJ_HD inline void each(const Team& team, int n, const F& f) {
  for (int i = team.row * team.columns + team.column; i < n; i += team.rows * team.columns) f(i);
}

// Whether direction k is in the active set.
GRADPROJ_HD inline bool swept(const double* T, int R, int k) { return T[k * R + k] < -0.5; }

// Takes p into the active set or out of it. T: the first R - 1 rows of the tableau. With row and column p of T set to 0
// and -+1 in place of the pivot, every entry of the result is T_ij - v_i v_j / pivot, which is symmetric to the bit.
// On entry no thread may still be reading T; on return all of it is written.
template <typename Team>
GRADPROJ_HD inline void sweep(const Team& team, double* T, int R, int p, double* v) {
  const double pivot = T[p * R + p];
  team.sync();
  each(team, R, [&](int j) {
    v[j] = j == p ? (pivot > 0.0 ? -1.0 : 1.0) : T[p * R + j];
    T[p * R + j] = 0.0;
    if (j < R - 1) T[j * R + p] = 0.0;
  });
  team.sync();
  const double inverse = 1.0 / pivot;
  for (int i = team.row; i < R - 1; i += team.rows) {
    double* row = T + i * R;
    for (int j = team.column; j < R; j += team.columns) row[j] -= v[i] * v[j] * inverse;
  }
  team.sync();
}

// y of "orthogonal": all independent directions enter, the one that has most outside the span of the others first.
template <typename Team>
GRADPROJ_HD inline void solve_all(const Team& team, double* T, int R, double* v, double* y) {
  for (;;) {
    int pivot = -1;
    double most = kRankTolerance;
    for (int k = 0; k < R - 1; ++k)
      if (T[k * R + k] > most) {
        most = T[k * R + k];
        pivot = k;
      }
    if (pivot < 0) break;
    sweep(team, T, R, pivot, v);
  }
  each(team, R - 1, [&](int k) { y[k] = swept(T, R, k) ? T[k * R + R - 1] : 0.0; });
  team.sync();
}

// y of "conflict": argmin over y >= 0 of y' C y / 2 - b' y (Lawson & Hanson 1974, chapter 23), one sweep a step. While
// some x_k <= 0 in the active set, y moves towards x until its first component reaches 0, and that direction leaves;
// otherwise y = x, and the most violated direction enters. In exact arithmetic y > 0 on the active set whenever a
// direction enters, so each entry lowers the objective and no active set comes twice. Rounding cannot loop either:
// after 10 R steps it returns false; y is feasible at every step.
template <typename Team>
GRADPROJ_HD inline bool solve_nonnegative(const Team& team, double* T, int R, double slack, double* v, double* y) {
  each(team, R - 1, [&](int k) { y[k] = 0.0; });
  team.sync();
  for (int limit = 10 * R; limit > 0; --limit) {
    int leaves = -1, enters = -1;
    double step = 1.0, most = slack;
    for (int k = 0; k < R - 1; ++k) {
      const double value = T[k * R + R - 1];
      if (swept(T, R, k)) {
        if (value > 0.0) continue;
        const double fraction = y[k] > 0.0 ? y[k] / (y[k] - value) : 0.0;
        if (leaves < 0 || fraction < step) {
          step = fraction;
          leaves = k;
        }
      } else if (value > most && T[k * R + k] > kRankTolerance) {
        most = value;
        enters = k;
      }
    }
    team.sync();
    each(team, R - 1, [&](int k) {
      const double moved = (1.0 - step) * y[k] + step * T[k * R + R - 1];
      y[k] = swept(T, R, k) && k != leaves && moved > 0.0 ? moved : 0.0;
    });
    if (leaves < 0 && enters < 0) {
      team.sync();
      return true;
    }
    sweep(team, T, R, leaves < 0 ? enters : leaves, v);
  }
  return false;
}

// One step of iterative refinement on the active set, with the residual from G itself: sweeps in and out of nearly
// dependent directions leave rounding errors. u: R - 1 doubles for it.
template <typename Team>
GRADPROJ_HD inline void refine(const Team& team, const double* G, const double* T, int R, double eps, const double* s,
                               double* u, double* w) {
  each(team, R - 1, [&](int k) {
    double left = G[(k + 1) * R] + eps * w[k + 1];
    for (int l = 1; l < R; ++l) left += G[(k + 1) * R + l] * w[l];
    u[k] = swept(T, R, k) ? -left * s[k] : 0.0;
  });
  team.sync();
  each(team, R - 1, [&](int k) {
    if (!swept(T, R, k)) return;
    double change = 0.0;
    for (int l = 0; l < R - 1; ++l) change -= T[k * R + l] * u[l];
    w[k + 1] += change * s[k];
  });
  team.sync();
}

// Every row is projected off the rows that it conflicts with, in ascending order, and the results are summed. A thread
// has row i: P[j R + i] is its inner product with row j as it stands until j's turn, then what it took from row j.
template <typename Team>
GRADPROJ_HD inline void pcgrad(const Team& team, const double* G, int R, double eps, double* w, double* P) {
  each(team, R, [&](int i) {
    for (int j = 0; j < R; ++j) P[j * R + i] = G[j * R + i];
    for (int j = 0; j < R; ++j) {
      const double product = P[j * R + i];
      P[j * R + i] = 0.0;
      if (i == j || !(product < 0.0)) continue;
      const double taken = product / (G[j * R + j] + eps);
      P[j * R + i] = taken;
      for (int l = j + 1; l < R; ++l) P[l * R + i] -= taken * G[j * R + l];
    }
  });
  team.sync();
  each(team, R, [&](int j) {
    double weight = 1.0;
    for (int i = 0; i < R; ++i) weight -= P[j * R + i];
    w[j] = weight;
  });
}

}  // namespace detail

// w: R doubles. scratch: weights_scratch(R) doubles, in shared memory on a device. Called by every thread of the team.
//   orthogonal  w_d = -pinv(G_dd) G_dg on the independent directions
//   conflict    w_d >= 0 minimises |g + sum_k w_k d_k|: nearest g' with <g', d_k> >= 0 (GEM; Lopez-Paz, Ranzato 2017)
//   pcgrad      gradient surgery between all rows (Yu et al. 2020), the inner loop in ascending order
// O(R^3) operations: a sweep is R (R - 1) of them, and there are at most 10 R, in practice fewer than 2 R.
template <typename Team>
GRADPROJ_HD inline void solve_weights(const Team& team, Rule rule, const double* G, int R, double* w, double* scratch) {
  const bool first = team.row == 0 && team.column == 0;
  if (R == 2) {
    if (first) solve_weights_k1(rule, G[0], G[1], G[3], w);
    return;
  }
  double* T = scratch;
  double* v = T + R * R;
  double* s = v + R;
  double* y = s + R;
  detail::each(team, R, [&](int i) {
    double zero = 0.0;
    for (int j = 0; j < R; ++j) zero += 0.0 * G[j * R + i];
    v[i] = zero;
    const double length2 = G[i * R + i] + rule.eps;
    if (i > 0) s[i - 1] = length2 > 0.0 ? 1.0 / sqrt(length2) : 0.0;
  });
  team.sync();
  bool finite = true;
  for (int i = 0; i < R; ++i) finite = finite && v[i] == 0.0;
  team.sync();
  if (!finite || rule.method == Method::mix) {
    detail::each(team, R, [&](int i) { w[i] = i == 0 ? 1.0 : finite ? rule.gamma : 0.0; });
    return;
  }
  if (rule.method == Method::pcgrad) return detail::pcgrad(team, G, R, rule.eps, w, T);

  for (int i = team.row; i < R - 1; i += team.rows)
    for (int j = team.column; j < R; j += team.columns)
      T[i * R + j] = j == R - 1 ? -G[(i + 1) * R] * s[i]
                                : (G[(i + 1) * R + j + 1] + (i == j ? rule.eps : 0.0)) * s[i] * s[j];
  team.sync();
  bool solved = true;
  if (rule.method == Method::orthogonal)
    detail::solve_all(team, T, R, v, y);
  else
    solved = detail::solve_nonnegative(team, T, R, 1e-12 * sqrt(G[0]), v, y);  // b is in units of |g|
  detail::each(team, R, [&](int i) { w[i] = i == 0 ? 1.0 : y[i - 1] * s[i - 1]; });
  team.sync();
  if (solved) detail::refine(team, G, T, R, rule.eps, s, v, w);
  if (rule.method == Method::conflict)
    detail::each(team, R, [&](int i) { w[i] = w[i] > 0.0 ? w[i] : 0.0; });
}

}  // namespace gradproj

// The op weights: a method's rule on the Gram of every part.
#include "weights.h"

#include "arguments.h"
#include "walk.h"

namespace gradproj::cpu {

void solve_parts(Rule rule, const double* gram, int64_t parts, int R, double* weights) {
  // A part is about R^3 operations, half a nanosecond each: 100 us make a chunk.
  const int64_t per_chunk = std::max<int64_t>(1, 200'000 / (int64_t{R} * R * R));
  Chunks chunks{};
  chunks.count = (parts + per_chunk - 1) / per_chunk;
  for_each_chunk(chunks, false, [&](int64_t chunk) {
    std::vector<double> scratch(static_cast<size_t>(weights_scratch(R)));
    for (int64_t p = chunk * per_chunk; p < std::min(parts, (chunk + 1) * per_chunk); ++p)
      solve_weights(Alone{}, rule, gram + p * R * R, R, weights + p * R, scratch.data());
  });
}

namespace {

Tensor weights_op(Tensor gram, std::string method, double gamma, double eps) {
  const auto [parts, rows] = gram_shape(gram);
  Tensor result = gram.dim() == 2 ? new_tensor({rows}) : new_tensor({parts, rows});
  solve_parts(parse_rule(method, gamma, eps), small(gram, parts * rows * rows, "gram"), parts, rows, data(result));
  return result;
}

}  // namespace
}  // namespace gradproj::cpu

STABLE_TORCH_LIBRARY_IMPL(gradproj, CPU, m) { m.impl("weights", TORCH_BOX(&gradproj::cpu::weights_op)); }

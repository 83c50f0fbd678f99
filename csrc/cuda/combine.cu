// combine_: chooses and launches the instances of combine.cuh, and the op.
#include "combine.cuh"

namespace gradproj::cuda {
namespace {

void launch_all(const Device& device, const Plan& plan, const WeightSource& source) {
  check_launchable(plan);
  const bool early = source.count > 0;  // after a Gram pass, which lets it
  for_each_launch(
      device, plan, row_0_and(1, plan.rows, true),
      [&](Kind kind, const Segments& p, int64_t blocks) {
        with_types(kind, [&]<typename G, typename D>(Types<G, D>) {
          launch("launch of combine", combine_dense<G, D>, blocks, device, early, p, source);
        });
      },
      [&](const StridedSegment& p, int64_t blocks) {
        launch("launch of combine", combine_strided, blocks, device, early, p, source);
      });
}

}  // namespace

void launch_combine(const Device& device, const Plan& plan, const double* weights) {
  WeightSource source{};
  source.weights = const_cast<double*>(weights);  // read only, without slots
  launch_all(device, plan, source);
}

void launch_combine_slots(const Device& device, const Plan& plan, Rule rule, const double* slots, int32_t count, double* gram,
                          double* weights) {
  launch_all(device, plan, {weights, slots, gram, rule, count});
}

}  // namespace gradproj::cuda

#ifndef GRADPROJ_EMULATION
#include "context.h"

namespace gradproj::cuda {
namespace {

void combine_op(StableListHandle grads, StableListHandle directions, Tensor weights, StableListHandle parts,
                int64_t num_parts) {
  const Rows rows(grads, directions, {parts, num_parts});
  const Plan plan = plan_to_write(rows);
  const Context context(rows.where());
  launch_combine(context.device, plan, context.small(weights, int64_t{plan.parts} * plan.rows, "weights"));
}

}  // namespace
}  // namespace gradproj::cuda

STABLE_TORCH_LIBRARY_IMPL(gradproj, CUDA, m) { m.impl("combine_", TORCH_BOX(&gradproj::cuda::combine_op)); }
#endif

// combine_: chooses and launches the instances of combine.cuh.
#include "combine.cuh"

namespace gradproj::cuda {

void launch_combine(const Device& device, const Plan& plan, const WeightSource& source) {
  check_launchable(plan);
  const bool early = source.count > 0;  // after a Gram pass, which lets it
  auto run = [&](auto kernel, int64_t blocks, const auto& p) {
    launch("launch of combine", kernel, blocks, device, early, p, source);
  };
  for_each_launch(
      device, plan, row_0_and(1, plan.rows, true),
      [&]<typename G, typename D>(Types<G, D>, const Segments& p, int64_t blocks) {
        run(combine_dense<G, D>, blocks, p);
      },
      [&](const StridedSegment& p, int64_t blocks) { run(combine_strided, blocks, p); });
}

}  // namespace gradproj::cuda

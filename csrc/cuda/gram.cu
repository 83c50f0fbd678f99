// gram: chooses and launches the instances of gram.cuh, and the op.
#include "gram.cuh"

namespace gradproj::cuda {
namespace {

int32_t pairs_of(const Pass& pass) { return pass.needs_first ? pass.count : pass.count * (pass.count + 1) / 2; }

Pass all_rows(const Plan& plan) { return row_0_and(1, plan.rows, false); }

constexpr int kGroup = kPassRows / 2;  // of more rows than a pass takes, so many at a time: two groups a pass

template <typename G, typename D>
void launch_dense(const Device& device, const Segments& p, const Pass& pass, const Slots& slots, int64_t blocks) {
  auto run = [&](auto kernel) { launch("launch of gram", kernel, blocks, device, false, p, slots); };
  if (pass.count <= 2) return run(gram_dense<G, D, 2, false>);  // the pairs of a row with one other come first
  if (pass.needs_first) return run(gram_dense<G, D, kPassRows, true>);
  if constexpr (sizeof(G) < 8)
    if (pass.count <= 5) return run(gram_dense<G, D, 5, false>);
  run(gram_dense<G, D, kPassRows, false>);
}

void launch_strided(const Device& device, const StridedSegment& p, const Pass& pass, const Slots& slots, int64_t blocks) {
  auto run = [&](auto kernel) { launch("launch of gram", kernel, blocks, device, false, p, slots); };
  if (pass.count <= 2) return run(gram_strided<2, false>);
  if (pass.needs_first) return run(gram_strided<kPassRows, true>);
  run(gram_strided<kPassRows, false>);
}

// The slots of all launches of a pass, of a plan with one part. Returns how many there are.
int32_t launch_slots(const Device& device, const Plan& plan, const Pass& pass, double* scratch) {
  Slots slots{scratch, pairs_of(pass), 0};
  auto launched = [&](int64_t blocks) { slots.written = std::max(slots.written, static_cast<int32_t>(blocks)); };
  for_each_launch(
      device, plan, pass,
      [&](Kind kind, const Segments& p, int64_t blocks) {
        with_types(kind, [&]<typename G, typename D>(Types<G, D>) { launch_dense<G, D>(device, p, pass, slots, blocks); });
        launched(blocks);
      },
      [&](const StridedSegment& p, int64_t blocks) {
        launch_strided(device, p, pass, slots, blocks);
        launched(blocks);
      });
  return slots.written;
}

// The same for several parts. The slots of a launch are added to the Gram before the next launch writes its own.
void launch_parts(const Device& device, const Plan& plan, const Pass& pass, double* scratch, Target target) {
  const Slots slots{scratch, pairs_of(pass), 0};
  auto finish = [&](int32_t count, int32_t part, int64_t parts) {
    launch("launch of gram", gram_finish, parts, device, false, slots, count, pass, target, part);
  };
  finish(0, 0, plan.parts);  // zeros, and gram_dd
  target.gram_dd = nullptr;
  target.add = true;
  for_each_launch(
      device, plan, pass,
      [&](Kind kind, const Segments& p, int64_t blocks) {
        with_types(kind, [&]<typename G, typename D>(Types<G, D>) { launch_dense<G, D>(device, p, pass, slots, blocks); });
        const int64_t parts = int64_t{p.part[p.count - 1]} - p.part[0] + 1;
        launch("launch of gram", gram_finish_parts, parts, device, false, p, slots, pass, target);
      },
      [&](const StridedSegment& p, int64_t blocks) {
        launch_strided(device, p, pass, slots, blocks);
        finish(static_cast<int32_t>(blocks), p.part, 1);
      });
}

void launch_pass(const Device& device, const Plan& plan, const Pass& pass, double* scratch, const Target& target) {
  if (plan.parts != 1) return launch_parts(device, plan, pass, scratch, target);
  const int32_t count = launch_slots(device, plan, pass, scratch);
  const Slots slots{scratch, pairs_of(pass), count};
  launch("launch of gram", gram_finish, 1, device, false, slots, count, pass, target, 0);
}

}  // namespace

int64_t gram_scratch(const Device& device, const Plan& plan) {
  const int64_t slots = device.most_blocks + (plan.parts > 1 ? plan.parts : 0);
  const int rows = std::min(plan.rows, kPassRows);
  return slots * rows * (rows + 1) / 2;
}

int32_t launch_gram_slots(const Device& device, const Plan& plan, double* scratch) {
  check_launchable(plan);
  return launch_slots(device, plan, all_rows(plan), scratch);
}

// Up to nine rows in one pass. More: every group of rows with every later group, R^2 / 8 reads of N in all. With known
// products of the directions: row 0 with eight others at a time.
void launch_gram(const Device& device, const Plan& plan, const double* gram_dd, double* scratch, double* gram) {
  check_launchable(plan);
  const int R = plan.rows;
  Target target{gram, gram_dd, R, false};
  if (gram_dd)
    for (int second = 1; second < R || second == 1; second += kPassRows - 1) {
      launch_pass(device, plan, row_0_and(second, 1 + std::min(R - second, kPassRows - 1), true), scratch, target);
      target.gram_dd = nullptr;  // copied by the first pass
    }
  else if (R <= kPassRows)
    launch_pass(device, plan, all_rows(plan), scratch, target);
  else
    for (int first = 0; first + kGroup < R; first += kGroup)
      for (int second = first + kGroup; second < R; second += kGroup)
        launch_pass(device, plan, {first, kGroup, second, kGroup + std::min(R - second, kGroup), false}, scratch, target);
}

}  // namespace gradproj::cuda

#ifndef GRADPROJ_EMULATION
#include "context.h"

namespace gradproj::cuda {
namespace {

Tensor gram_op(StableListHandle list, int64_t num_rows, std::optional<Tensor> gram_dd, StableListHandle parts,
               int64_t num_parts) {
  const Rows rows(list, num_rows, {parts, num_parts});
  const Plan plan = make_plan(rows.buffers(), rows.layout());
  const Context context(rows.where());
  Tensor gram = context.doubles(rows.shape(2)), scratch = context.doubles({gram_scratch(context.device, plan)});
  launch_gram(context.device, plan, context.gram_dd(gram_dd, plan), data(scratch), data(gram));
  return gram;
}

}  // namespace
}  // namespace gradproj::cuda

STABLE_TORCH_LIBRARY_IMPL(gradproj, CUDA, m) { m.impl("gram", TORCH_BOX(&gradproj::cuda::gram_op)); }
#endif

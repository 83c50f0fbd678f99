// gram: chooses and launches the instances of gram.cuh.
#include "gram.cuh"

namespace gradproj::cuda {
namespace {

int32_t pairs_of(const Pass& pass) { return pass.needs_first ? pass.count : pass.count * (pass.count + 1) / 2; }

Pass all_rows(const Plan& plan) { return row_0_and(1, plan.rows, false); }

constexpr int kHalfPass = kPassRows / 2;  // of more rows than a pass takes, so many at a time: two halves a pass

template <typename... Arguments>
void run(const Device& device, void (*kernel)(Arguments...), int64_t blocks, const Arguments&... arguments) {
  launch("launch of gram", kernel, blocks, device, false, arguments...);
}

template <typename G, typename D>
auto choose_dense(const Pass& pass) {
  if (pass.count <= 2) return gram_dense<G, D, 2, false>;  // the pairs of a row with one other come first
  if (pass.needs_first) return gram_dense<G, D, kPassRows, true>;
  if constexpr (sizeof(G) < 8)
    if (pass.count <= 5) return gram_dense<G, D, 5, false>;
  return gram_dense<G, D, kPassRows, false>;
}

auto choose_strided(const Pass& pass) {
  if (pass.count <= 2) return gram_strided<2, false>;
  return pass.needs_first ? gram_strided<kPassRows, true> : gram_strided<kPassRows, false>;
}

// The slots of all launches of a pass; done(parameters, blocks) follows each.
template <typename Done>
void launch_slots(const Device& device, const Plan& plan, const Pass& pass, const Slots& slots, const Done& done) {
  for_each_launch(
      device, plan, pass,
      [&]<typename G, typename D>(Types<G, D>, const Segments& p, int64_t blocks) {
        run(device, choose_dense<G, D>(pass), blocks, p, slots);
        done(p, blocks);
      },
      [&](const StridedSegment& p, int64_t blocks) {
        run(device, choose_strided(pass), blocks, p, slots);
        done(p, blocks);
      });
}

// A plan of one part: all launches share the slots. Returns how many there are.
int32_t launch_one_part(const Device& device, const Plan& plan, const Pass& pass, double* scratch) {
  Slots slots{scratch, pairs_of(pass), 0};
  launch_slots(device, plan, pass, slots, [&](const auto&, int64_t blocks) {
    slots.written = std::max(slots.written, static_cast<int32_t>(blocks));
  });
  return slots.written;
}

// Several parts: the slots of a launch are added to the Gram before the next launch writes its own.
void launch_parts(const Device& device, const Plan& plan, const Pass& pass, double* scratch, Target target) {
  const Slots slots{scratch, pairs_of(pass), 0};
  run(device, gram_finish, plan.parts, slots, 0, pass, target, 0);  // zeros, and gram_dd
  target.gram_dd = nullptr;
  target.add = true;
  launch_slots(device, plan, pass, slots, [&]<typename P>(const P& p, int64_t blocks) {
    if constexpr (std::is_same_v<P, StridedSegment>)
      run(device, gram_finish, 1, slots, static_cast<int32_t>(blocks), pass, target, p.part);
    else
      run(device, gram_finish_parts, int64_t{p.part[p.count - 1]} - p.part[0] + 1, p, slots, pass, target);
  });
}

void launch_pass(const Device& device, const Plan& plan, const Pass& pass, double* scratch, const Target& target) {
  if (plan.parts != 1) return launch_parts(device, plan, pass, scratch, target);
  const int32_t count = launch_one_part(device, plan, pass, scratch);
  run(device, gram_finish, 1, Slots{scratch, pairs_of(pass), count}, count, pass, target, 0);
}

}  // namespace

int64_t gram_scratch(const Device& device, const Plan& plan) {
  const int64_t slots = device.most_blocks + (plan.parts > 1 ? plan.parts : 0);
  const int rows = std::min(plan.rows, kPassRows);
  return slots * rows * (rows + 1) / 2;
}

int32_t launch_gram_slots(const Device& device, const Plan& plan, double* scratch) {
  check_launchable(plan);
  return launch_one_part(device, plan, all_rows(plan), scratch);
}

// Up to nine rows in one pass. More: every half pass of rows with every later one, R^2 / 8 reads of N in all. With
// known products of the directions: row 0 with eight others at a time.
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
    for (int first = 0; first + kHalfPass < R; first += kHalfPass)
      for (int second = first + kHalfPass; second < R; second += kHalfPass)
        launch_pass(device, plan, {first, kHalfPass, second, kHalfPass + std::min(R - second, kHalfPass), false},
                    scratch, target);
}

}  // namespace gradproj::cuda

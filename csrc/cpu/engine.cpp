#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernels.h"
#include "mixed.h"
#include "rows.h"
#include "short_trial.h"
#include "sparse.h"
#include "tile_ranges.h"
#include "ways.h"

namespace recap::cpu {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> sets = {&kernels_baseline};
#if defined(RECAP_WITH_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2) sets.push_back(&kernels_avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&kernels_avx512);
  }
#endif
  return sets;
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> kernels = available().back();
  return kernels;
}

// Tiles of one tensor that follow each other are updated at once, but not more: a run is what is
// timed, and the streams of a longer one would be pages apart for nothing.
constexpr size_t kTilesOfRun = 16;

void* advance(void* address, int64_t bytes) {
  return address ? static_cast<char*>(address) + bytes : nullptr;
}

// The elements [begin, begin + size) of a slot.
Arrays arrays_of(const Slot& slot, const void* grad, int64_t begin, int64_t size) {
  const int64_t offset = begin * dtype_size(slot.dtype);
  Arrays arrays;
  arrays.param = advance(slot.param, offset);
  arrays.grad = static_cast<const char*>(grad) + offset;
  for (int k = 0; k < kMaxStates; ++k) arrays.state[k] = advance(slot.state[k], offset);
  arrays.size = size;
  return arrays;
}

// The elements [begin, begin + size) of a slot, with requests for the memory of the next.
void update(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
            int64_t begin, int64_t size, Prefetch& prefetch) {
  if (slot.format) {
    update_mixed(kernels, slot, values, grad, begin, size, prefetch);
    return;
  }
  kernels.of[static_cast<int>(slot.dtype)][static_cast<int>(values.update)](
      values, arrays_of(slot, grad, begin, size), prefetch);
}

// The same for the middle of a long slot, in the given way, without these requests.
void update_middle(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
                   int64_t begin, int64_t size, Way way) {
  if (slot.format) {
    update_middle_of_mixed(kernels, slot, values, grad, begin, size, way);
    return;
  }
  kernels.middle_of[static_cast<int>(slot.dtype)][static_cast<int>(values.update)](
      values, arrays_of(slot, grad, begin, size), way);
}

void run_tile(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
              const Tile& tile, Prefetch& prefetch) {
  if (slot.row_size) {
    run_row_tile(kernels, slot, values, grad, tile);
    return;
  }
  update(kernels, slot, values, grad, tile.begin, tile.size, prefetch);
}

// Tiles of one long slot, the first of them `first`. Its middle is updated in the way that was
// found best, or in one that is to be tried. `number` is that of the step. Returns how many tiles
// there are. Not inlined, so that it costs short slots nothing.
__attribute__((noinline)) size_t run_long(const Kernels& kernels, const Plan& plan,
                                          const Step& step, uint64_t number, size_t first,
                                          size_t end, Prefetch& prefetch) {
  const Tile& tile = plan.tiles[first];
  const Slot& slot = plan.slots[tile.slot];
  const void* const grad = step.grads[tile.slot];
  const Values& values = step.values[step.values_of_slot[tile.slot]];
  const size_t count = std::min({tiles_left(slot, tile), end - first, kTilesOfRun});
  const Tile& last = plan.tiles[first + count - 1];
  const int64_t size = last.begin + last.size - tile.begin;

  const int64_t middle = Prefetch::before_last_blocks(slot, tile.begin, size);
  Tuner& tuner = tuner_of(slot);
  // What is left of a slot at its end is no fair trial.
  const bool is_fair = middle * dtype_size(slot.dtype) >= kLongBytes / 2;
  const Tuner::Trial trial = is_fair ? tuner.next(number) : Tuner::Trial{tuner.current()};
  using Clock = std::chrono::steady_clock;
  const auto begun = trial.number < 0 ? Clock::time_point() : Clock::now();
  const Kernels& of_middle = trial.way.narrow && kernels.narrow ? *kernels.narrow : kernels;
  update_middle(of_middle, slot, values, grad, tile.begin, middle, trial.way);
  if (trial.number >= 0) {
    tuner.finish(trial, std::chrono::duration<double>(Clock::now() - begun).count() / middle);
  }
  update(kernels, slot, values, grad, tile.begin + middle, size - middle, prefetch);
  return count;
}

void run_tiles(const Kernels& kernels, const Plan& plan, const Step& step, uint64_t number,
               size_t begin, size_t end) {
  ShortTrial trial(plan, step, number, begin, end);
  Prefetch prefetch(plan, step, begin, end, trial.level());
  for (size_t i = begin; i < end;) {
    const Tile& tile = plan.tiles[i];
    const Slot& slot = plan.slots[tile.slot];
    const void* const grad = step.grads[tile.slot];
    if (!grad) {
      i += tiles_left(slot, tile);
      continue;
    }
    if (is_long(slot) && !slot.row_size) {
      trial.stop();
      i += run_long(kernels, plan, step, number, i, end, prefetch);
      trial.go_on();
      continue;
    }
    run_tile(kernels, slot, step.values[step.values_of_slot[tile.slot]], grad, tile, prefetch);
    ++i;
  }
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

void run(const Plan& plan, const Step& step, const ThreadPool& pool) {
  static std::atomic<uint64_t> steps{0};
  struct Context {
    const Kernels& kernels;
    const Plan& plan;
    const Step& step;
    uint64_t number;
  } context{kernels(), plan, step, steps.fetch_add(1, std::memory_order_relaxed)};
  run_tile_ranges(
      plan, step, pool,
      [](size_t begin, size_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        run_tiles(c.kernels, c.plan, c.step, c.number, begin, end);
      },
      &context);
  if (!step.sparse.empty()) run_sparse(plan, step, pool);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->instruction_set);
  return names;
}

bool use_instruction_set(const std::string& name) {
  const auto sets = available();
  for (const Kernels* kernels : sets) {
    if (name == kernels->instruction_set || (name.empty() && kernels == sets.back())) {
      in_use() = kernels;
      return true;
    }
  }
  return false;
}

std::string instruction_set_in_use() { return in_use().load()->instruction_set; }

}  // namespace recap::cpu

#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernels.h"
#include "rows.h"
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

// Updates `size` elements of a slot from `begin` on. `number` is that of the step.
void run_elements(const Kernels& kernels, const Slot& slot, const Values& values, const void* grad,
                  int64_t begin, int64_t size, uint64_t number, Prefetch& prefetch) {
  const int64_t offset = begin * dtype_size(slot.dtype);
  Arrays arrays;
  arrays.param = advance(slot.param, offset);
  arrays.grad = static_cast<const char*>(grad) + offset;
  for (int k = 0; k < kMaxStates; ++k) arrays.state[k] = advance(slot.state[k], offset);
  arrays.size = size;
  arrays.quiet = 0;
  const Kernel kernel = kernels.of[static_cast<int>(slot.dtype)][static_cast<int>(values.update)];
  if (!is_long(slot)) {
    kernel(values, arrays, prefetch);
    return;
  }
  arrays.quiet = Prefetch::before_last_blocks(slot, begin, size);
  Tuner& tuner = tuner_of(slot);
  const Tuner::Trial trial = tuner.next(number);
  arrays.way = trial.way;
  if (trial.number < 0) {
    kernel(values, arrays, prefetch);
    return;
  }
  using Clock = std::chrono::steady_clock;
  const auto begun = Clock::now();
  kernel(values, arrays, prefetch);
  tuner.finish(trial, std::chrono::duration<double>(Clock::now() - begun).count() / size);
}

void run_tiles(const Kernels& kernels, const Plan& plan, const Step& step, uint64_t number,
               size_t begin, size_t end) {
  Prefetch prefetch(plan, step, begin, end);
  for (size_t i = begin; i < end;) {
    const Tile& tile = plan.tiles[i];
    const Slot& slot = plan.slots[tile.slot];
    const void* const grad = step.grads[tile.slot];
    if (!grad) {
      i += tiles_left(slot, tile);
      continue;
    }
    const Values& values = step.values[step.values_of_slot[tile.slot]];
    if (slot.row_size) {
      run_row_tile(kernels, slot, values, grad, tile);
      ++i;
      continue;
    }
    const size_t count = std::min({tiles_left(slot, tile), end - i, kTilesOfRun});
    const Tile& last = plan.tiles[i + count - 1];
    run_elements(kernels, slot, values, grad, tile.begin, last.begin + last.size - tile.begin,
                 number, prefetch);
    i += count;
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

#include "engine.h"

#include <atomic>

#include "kernels.h"
#include "rows.h"
#include "sparse.h"
#include "tile_ranges.h"

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

void* advance(void* address, int64_t bytes) {
  return address ? static_cast<char*>(address) + bytes : nullptr;
}

void run_tile(const Kernels& kernels, const Plan& plan, const Step& step, const Tile& tile,
              const void* grad, Prefetch& prefetch) {
  const Slot& slot = plan.slots[tile.slot];
  const Values& values = step.values[step.values_of_slot[tile.slot]];
  if (slot.row_size) {
    run_row_tile(kernels, slot, values, grad, tile);
    return;
  }
  const int64_t offset = tile.begin * dtype_size(slot.dtype);
  Arrays arrays;
  arrays.param = advance(slot.param, offset);
  arrays.grad = static_cast<const char*>(grad) + offset;
  for (int k = 0; k < kMaxStates; ++k) arrays.state[k] = advance(slot.state[k], offset);
  arrays.size = tile.size;
  kernels.of[static_cast<int>(slot.dtype)][static_cast<int>(values.update)](values, arrays,
                                                                            prefetch);
}

void run_tiles(const Kernels& kernels, const Plan& plan, const Step& step, size_t begin,
               size_t end) {
  Prefetch prefetch(plan, step, begin, end);
  for (size_t i = begin; i < end;) {
    const Tile& tile = plan.tiles[i];
    const void* const grad = step.grads[tile.slot];
    if (!grad) {
      i += tiles_left(plan.slots[tile.slot], tile);
      continue;
    }
    run_tile(kernels, plan, step, tile, grad, prefetch);
    ++i;
  }
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

void run(const Plan& plan, const Step& step, const ThreadPool& pool) {
  struct Context {
    const Kernels& kernels;
    const Plan& plan;
    const Step& step;
  } context{kernels(), plan, step};
  run_tile_ranges(
      plan, step, pool,
      [](size_t begin, size_t end, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        run_tiles(c.kernels, c.plan, c.step, begin, end);
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

#include "engine.h"

#include <algorithm>
#include <atomic>

#include "kernels.h"

namespace recap::cpu {
namespace {

// Below this many bytes of parameters for each thread, waking it costs more than it saves.
constexpr int64_t kMinBytesPerThread = 128 * 1024;

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

void run_tile(const Kernels& kernels, const Plan& plan, const Step& step, const Tile& tile) {
  const void* grad = step.grads[tile.slot];
  if (!grad) return;
  const Slot& slot = plan.slots[tile.slot];
  const Values& values = step.values[step.values_of_slot[tile.slot]];
  const int64_t offset = tile.begin * dtype_size(slot.dtype);
  Arrays arrays;
  arrays.param = advance(slot.param, offset);
  arrays.grad = static_cast<const char*>(grad) + offset;
  for (int k = 0; k < kMaxStates; ++k) arrays.state[k] = advance(slot.state[k], offset);
  arrays.size = tile.size;
  kernels.of[static_cast<int>(slot.dtype)][static_cast<int>(values.update)](values, arrays);
}

// Asks for the first elements of a tile that is soon to run: with many small tensors, each starts
// with a miss in every array.
void prefetch_tile(const Plan& plan, const Step& step, const Tile& tile) {
  if (!step.grads[tile.slot]) return;
  const Slot& slot = plan.slots[tile.slot];
  const int64_t offset = tile.begin * dtype_size(slot.dtype);
  __builtin_prefetch(advance(slot.param, offset), 1);
  __builtin_prefetch(static_cast<const char*>(step.grads[tile.slot]) + offset);
  for (void* state : slot.state) __builtin_prefetch(advance(state, offset), 1);
}

void run_tiles(const Kernels& kernels, const Plan& plan, const Step& step, size_t begin,
               size_t end) {
  constexpr size_t kAhead = 4;
  for (size_t tile = begin; tile < end; ++tile) {
    if (tile + kAhead < end) prefetch_tile(plan, step, plan.tiles[tile + kAhead]);
    run_tile(kernels, plan, step, plan.tiles[tile]);
  }
}

int64_t active_bytes(const Plan& plan, const Step& step) {
  int64_t bytes = 0;
  for (size_t slot = 0; slot < plan.slots.size(); ++slot) {
    if (step.grads[slot]) bytes += plan.slots[slot].size * dtype_size(plan.slots[slot].dtype);
  }
  return bytes;
}

// One contiguous run of tiles for each thread, of equal bytes: neighbouring chunks dealt out in
// turn would make the threads compete for the same pages and prefetch streams.
void split_tiles(const Plan& plan, const Step& step, int64_t bytes, int threads,
                 std::vector<size_t>& bounds) {
  bounds.assign(1, 0);
  int64_t done = 0;
  for (size_t tile = 0; tile < plan.tiles.size(); ++tile) {
    const Tile& t = plan.tiles[tile];
    if (!step.grads[t.slot]) continue;
    done += t.size * dtype_size(plan.slots[t.slot].dtype);
    while (static_cast<int>(bounds.size()) < threads &&
           done * threads >= bytes * static_cast<int64_t>(bounds.size())) {
      bounds.push_back(tile + 1);
    }
  }
  bounds.resize(threads, plan.tiles.size());
  bounds.push_back(plan.tiles.size());
}

}  // namespace

void run(const Plan& plan, const Step& step, const ThreadPool& pool) {
  const Kernels& kernels = *in_use().load(std::memory_order_relaxed);
  const int64_t bytes = pool.threads > 1 ? active_bytes(plan, step) : 0;
  const int threads = static_cast<int>(std::min<int64_t>(pool.threads, bytes / kMinBytesPerThread));
  if (threads <= 1) {
    run_tiles(kernels, plan, step, 0, plan.tiles.size());
    return;
  }
  thread_local std::vector<size_t> bounds;  // kept, so that a step allocates nothing
  split_tiles(plan, step, bytes, threads, bounds);
  struct Context {
    const Kernels& kernels;
    const Plan& plan;
    const Step& step;
    const size_t* bounds;
  } context{kernels, plan, step, bounds.data()};
  pool.run(
      threads,
      [](int index, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        run_tiles(c.kernels, c.plan, c.step, c.bounds[index], c.bounds[index + 1]);
      },
      &context);
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

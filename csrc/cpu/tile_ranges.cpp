#include "tile_ranges.h"

#include <algorithm>
#include <vector>

#include "float_mode.h"

namespace recap::cpu {
namespace {

// Below this many bytes of parameters for each thread, waking it costs more than it saves.
constexpr int64_t kMinBytesPerThread = 128 * 1024;

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
    if (!step.grads[t.slot]) {
      tile += tiles_left(plan.slots[t.slot], t) - 1;
      continue;
    }
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

void run_tile_ranges(const Plan& plan, const Step& step, const ThreadPool& pool,
                     void (*task)(size_t begin, size_t end, void* context), void* context) {
  const int64_t bytes = pool.threads > 1 ? active_bytes(plan, step) : 0;
  const int threads = static_cast<int>(std::min<int64_t>(pool.threads, bytes / kMinBytesPerThread));
  if (threads <= 1) {
    task(0, plan.tiles.size(), context);
    return;
  }
  thread_local std::vector<size_t> bounds;  // kept, so that a step allocates nothing
  split_tiles(plan, step, bytes, threads, bounds);
  struct Ranges {
    const size_t* bounds;
    void (*task)(size_t, size_t, void*);
    void* context;
    FloatMode mode;
  } ranges{bounds.data(), task, context, float_mode()};
  pool.run(
      threads,
      [](int index, void* opaque) {
        const Ranges& r = *static_cast<Ranges*>(opaque);
        const FlushingAs caller(r.mode);
        r.task(r.bounds[index], r.bounds[index + 1], r.context);
      },
      &ranges);
}

}  // namespace recap::cpu

// The trials of how short tensors are updated: of all that a thread has of a step at once, since
// one alone is too short to be timed.
#pragma once

#include <chrono>

#include "prefetch.h"
#include "tile_ranges.h"
#include "ways.h"

namespace recap::cpu {

// So many bytes of short tensors are a trial of how they are updated: they fit no cache of a core.
constexpr int64_t kShortTrialBytes = 2 * 1024 * 1024;

// A prime number, so that of several optimizers that take turns each is counted.
constexpr uint64_t kStepsBetweenCounts = 61;

// Bytes of all arrays of the short tensors of a range.
inline int64_t short_bytes(const Plan& plan, const Step& step, size_t begin, size_t end) {
  int64_t bytes = 0;
  for (size_t i = begin; i < end;) {
    const Tile& tile = plan.tiles[i];
    const Slot& slot = plan.slots[tile.slot];
    const bool counts = step.grads[tile.slot] && !slot.row_size && !is_long(slot);
    if (counts) bytes += tile.size * dtype_size(slot.dtype) * array_count(slot);
    i += counts ? 1 : tiles_left(slot, tile);
  }
  return bytes;
}

// How the short tensors of a range are updated, and how long it takes where that is tried.
class ShortTrial {
 public:
  ShortTrial(const Plan& plan, const Step& step, uint64_t number, size_t begin, size_t end)
      : trial_{tuner_.current()} {
    // The last plan that was: it is counted again now and then, since others may have gradients.
    thread_local const Plan* too_small = nullptr;
    if (tuner_.chosen() || (&plan == too_small && number % kStepsBetweenCounts != 0)) return;
    bytes_ = short_bytes(plan, step, begin, end);
    if (bytes_ < kShortTrialBytes) {
      too_small = &plan;
      return;
    }
    trial_ = tuner_.next(number);
    go_on();
  }
  ~ShortTrial() {
    if (trial_.number < 0) return;
    stop();
    tuner_.finish(trial_, time_.count() / bytes_);
  }
  ShortTrial(const ShortTrial&) = delete;
  ShortTrial& operator=(const ShortTrial&) = delete;

  int level() const { return trial_.way.level; }

  // Before and after what is no short tensor.
  void stop() {
    if (trial_.number >= 0) time_ += Clock::now() - begun_;
  }
  void go_on() {
    if (trial_.number >= 0) begun_ = Clock::now();
  }

 private:
  using Clock = std::chrono::steady_clock;

  Tuner& tuner_ = tuner_of_short();
  Tuner::Trial trial_;
  int64_t bytes_ = 0;
  Clock::time_point begun_;
  std::chrono::duration<double> time_{0};
};

}  // namespace recap::cpu

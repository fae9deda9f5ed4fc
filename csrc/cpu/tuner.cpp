#include "tuner.h"

#include <algorithm>

namespace recap::cpu {

Tuner::Tuner(const std::vector<Way>& candidates)
    : ways_count_(static_cast<int>(std::min(candidates.size(), kMaxWays))) {
  std::copy_n(candidates.begin(), ways_count_, ways_);
  if (ways_count_ == 1) chosen_ = 0;
}

Tuner::Trial Tuner::try_next(uint64_t step) {
  if (last_step_.exchange(step, std::memory_order_relaxed) != step) ++steps_;
  if (steps_ <= kWarmUp) return {ways_[0]};
  const int number = started_.load() < ways_count_ * kTrials ? started_++ : ways_count_ * kTrials;
  if (number >= ways_count_ * kTrials) return {ways_[0]};
  return {ways_[way_of(number)], number};
}

// All take their turns before one has another, each time from another one on: two optimizers may
// take turns, too.
int Tuner::way_of(int trial) const {
  const int turn = trial / ways_count_;
  const uint32_t mixed = static_cast<uint32_t>(turn) * 0x9e3779b9u;
  return static_cast<int>((trial + (mixed >> 16)) % ways_count_);
}

void Tuner::finish(const Trial& trial, double time) {
  if (trial.number < 0) return;
  times_[way_of(trial.number)][trial.number / ways_count_] = time;
  if (++finished_ < ways_count_ * kTrials) return;
  // The middle one, since a thread may be interrupted.
  double best = 0.0;
  int chosen = -1;
  for (int way = 0; way < ways_count_; ++way) {
    double* const times = times_[way];
    std::nth_element(times, times + kTrials / 2, times + kTrials);
    if (chosen < 0 || times[kTrials / 2] < best) {
      best = times[kTrials / 2];
      chosen = way;
    }
  }
  chosen_.store(chosen, std::memory_order_release);
}

std::optional<Way> Tuner::chosen() const {
  const int chosen = chosen_.load(std::memory_order_acquire);
  if (chosen < 0) return std::nullopt;
  return ways_[chosen];
}

}  // namespace recap::cpu

// How the blocks of a tensor are updated, which changes no bit of the result, and how the best way
// of a machine is found: by measuring, while the first steps take turns with the candidates.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

namespace recap::cpu {

struct Way {
  // The tensor is cut into so many parts, of which one block each is updated in turn: one thread
  // may get more of the memory's bandwidth from several streams than from one.
  int streams = 1;
  // Memory of so many blocks after the one that is updated is asked for; 0: of none, where the
  // processor's own prefetcher does better alone.
  int ahead = 0;
  // With vectors of half the width, if there are wide ones. Where memory is all that an update
  // waits for, they can be faster.
  bool narrow = false;
  // Of short tensors, the cache that is asked to have their memory: more can be on its way to the
  // second than to the first.
  int level = 1;

  bool operator==(const Way& other) const {
    return streams == other.streams && ahead == other.ahead && narrow == other.narrow &&
           level == other.level;
  }
};

// Chooses for one class of work. Any number of threads may use it at once.
class Tuner {
 public:
  static constexpr int kTrials = 32;      // of each candidate
  static constexpr uint64_t kWarmUp = 2;  // steps: in the first, memory is given to new states

  // At most kMaxWays; of one there is nothing to choose. Until it is chosen, the first is used.
  static constexpr size_t kMaxWays = 8;
  explicit Tuner(const std::vector<Way>& candidates);

  struct Trial {
    Way way;
    int number = -1;  // -1: nobody asks how long it takes
  };

  // How the next run is to be made; `step` tells those of one step from those of another.
  Trial next(uint64_t step) {
    const int chosen = chosen_.load(std::memory_order_acquire);
    return chosen >= 0 ? Trial{ways_[chosen]} : try_next(step);
  }

  // How long it took, in any unit, for each element.
  void finish(const Trial& trial, double time);

  // The way of runs that are not measured.
  Way current() const {
    const int chosen = chosen_.load(std::memory_order_acquire);
    return ways_[chosen >= 0 ? chosen : 0];
  }

  // Nothing before all trials are finished; it stays.
  std::optional<Way> chosen() const;

  // The same, and nothing where there is but one candidate.
  std::optional<Way> found_best() const { return ways_count_ > 1 ? chosen() : std::nullopt; }

 private:
  Trial try_next(uint64_t step);
  int way_of(int trial) const;

  int ways_count_;
  Way ways_[kMaxWays];
  std::atomic<int> chosen_{-1};
  std::atomic<uint64_t> last_step_{~uint64_t{0}}, steps_{0};
  std::atomic<int> started_{0}, finished_{0};
  double times_[kMaxWays][kTrials];
};

}  // namespace recap::cpu

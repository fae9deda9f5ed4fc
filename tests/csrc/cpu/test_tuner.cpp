// How a way is chosen by measuring: every candidate takes its turns, the fastest stays, and it
// ends.
#include "cpu/tuner.h"

#include <algorithm>
#include <set>
#include <thread>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/ways.h"

namespace {

using recap::cpu::Tuner;
using recap::cpu::Way;

const std::vector<Way> kThree = {{1, 8}, {1, 0}, {2, 0}};
constexpr uint64_t kStep = Tuner::kWarmUp;  // the first that is measured

// Goes through the warm-up.
void warm_up(Tuner& tuner) {
  for (uint64_t step = 0; step < kStep; ++step) {
    for (int run = 0; run < 100; ++run) {
      const Tuner::Trial trial = tuner.next(step);
      CHECK(trial.way == kThree[0]);
      CHECK_EQ(trial.number, -1);
    }
  }
}

int number_of(const Way& way) {
  return static_cast<int>(std::find(kThree.begin(), kThree.end(), way) - kThree.begin());
}

// Makes all trials, each as long as `time` says.
template <typename Time>
void measure(Tuner& tuner, const Time& time) {
  warm_up(tuner);
  std::vector<int> turns(3), firsts(3);
  for (int number = 0; number < 3 * Tuner::kTrials; ++number) {
    CHECK(!tuner.chosen().has_value());
    const Tuner::Trial trial = tuner.next(kStep);
    CHECK_EQ(trial.number, number);
    const int way = number_of(trial.way);
    CHECK_EQ(turns[way]++, number / 3);  // they take turns
    if (number % 3 == 0) ++firsts[way];
    tuner.finish(trial, time(way, number / 3));
  }
  for (const int first : firsts) CHECK(first > 0 && first < Tuner::kTrials / 2);
}

TEST(the_fastest_is_chosen_and_stays) {
  for (int fastest = 0; fastest < 3; ++fastest) {
    Tuner tuner(kThree);
    measure(tuner, [&](int way, int) { return way == fastest ? 0.9 : 1.0; });
    CHECK(tuner.chosen() == kThree[fastest]);
    for (uint64_t step = kStep; step < 100; ++step) {
      const Tuner::Trial trial = tuner.next(step);
      CHECK(trial.way == kThree[fastest]);
      CHECK_EQ(trial.number, -1);  // nobody measures any more
      tuner.finish(trial, 100.0);
    }
    CHECK(tuner.chosen() == kThree[fastest]);
  }
}

TEST(interrupted_trials_do_not_decide) {
  Tuner tuner(kThree);
  measure(tuner, [](int way, int trial) {
    if (way == 2) return trial % 3 == 0 ? 50.0 : 0.9;  // the best, but for a third of its trials
    return trial % 3 == 0 ? 0.1 : 1.0;                 // others, with a few that are too good
  });
  CHECK(tuner.chosen() == kThree[2]);
}

TEST(nothing_is_chosen_before_the_last_trial_is_over) {
  Tuner tuner(kThree);
  warm_up(tuner);
  std::vector<Tuner::Trial> trials;
  for (int number = 0; number < 3 * Tuner::kTrials; ++number) trials.push_back(tuner.next(kStep));
  for (int run = 0; run < 100; ++run) {  // those that come meanwhile
    const Tuner::Trial other = tuner.next(kStep + 1);
    CHECK(other.way == kThree[0]);
    CHECK_EQ(other.number, -1);
  }
  for (size_t i = trials.size(); i-- > 0;) {
    CHECK(!tuner.chosen().has_value());
    tuner.finish(trials[i], trials[i].way == kThree[1] ? 0.5 : 1.0);
  }
  CHECK(tuner.chosen() == kThree[1]);
}

TEST(of_one_candidate_there_is_nothing_to_choose) {
  Tuner tuner({{4, 3}});
  CHECK(tuner.chosen() == (Way{4, 3}));
  CHECK_EQ(tuner.next(0).number, -1);
  CHECK(tuner.next(0).way == (Way{4, 3}));
}

TEST(threads_measure_together) {
  Tuner tuner(kThree);
  warm_up(tuner);
  std::vector<std::vector<int>> numbers(4);
  std::vector<std::thread> threads;
  for (std::vector<int>& own : numbers) {
    threads.emplace_back([&] {
      while (!tuner.chosen()) {
        const Tuner::Trial trial = tuner.next(kStep);
        if (trial.number >= 0) own.push_back(trial.number);
        tuner.finish(trial, trial.way == kThree[2] ? 0.5 : 1.0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::multiset<int> all;
  for (const std::vector<int>& own : numbers) all.insert(own.begin(), own.end());
  CHECK_EQ(all.size(), size_t{3 * Tuner::kTrials});
  for (int number = 0; number < 3 * Tuner::kTrials; ++number)
    CHECK_EQ(all.count(number), size_t{1});
  CHECK(tuner.chosen() == kThree[2]);
}

TEST(what_is_fixed_is_not_measured) {
  recap::Slot slot;
  slot.size = 1 << 20;
  using recap::cpu::fix_way;
  using recap::cpu::tuner_of;
  fix_way(3, 5);
  CHECK(tuner_of(slot).chosen() == (Way{3, 5}));
  CHECK(recap::cpu::chosen_ways().empty());
  fix_way(2, std::nullopt);
  CHECK(!tuner_of(slot).chosen().has_value());
  CHECK_EQ(tuner_of(slot).next(0).way.streams, 2);
  fix_way(std::nullopt, 7);
  CHECK_EQ(tuner_of(slot).next(0).way.ahead, 7);
  CHECK(recap::cpu::chosen_ways().empty());
  fix_way(std::nullopt, std::nullopt);
  CHECK(!tuner_of(slot).chosen().has_value());
}

TEST(vectors_of_half_the_width_are_measured_too_if_nothing_is_fixed) {
  recap::Slot slot;
  slot.size = 1 << 20;
  recap::cpu::fix_way(std::nullopt, std::nullopt);
  Tuner& tuner = recap::cpu::tuner_of(slot);
  for (uint64_t step = 0; step < kStep; ++step) tuner.next(step);
  int narrow = 0;
  while (!tuner.chosen()) {
    const Tuner::Trial trial = tuner.next(kStep);
    narrow += trial.way.narrow;
    tuner.finish(trial, trial.way.narrow ? 1.0 + trial.way.streams : 10.0);
  }
  CHECK_EQ(narrow > 0, recap::cpu::kernels().narrow != nullptr);
  if (narrow) CHECK(tuner.chosen() == (Way{1, 0, true}));
  recap::cpu::fix_way(std::nullopt, std::nullopt);
}

TEST(classes_of_work_are_measured_apart) {
  recap::Slot slot;
  slot.size = recap::cpu::kLargeBytes / 4 - 1;
  Tuner& less = recap::cpu::tuner_of(slot);
  CHECK(&less == &recap::cpu::tuner_of(slot));
  slot.size += 1;
  Tuner& large = recap::cpu::tuner_of(slot);
  CHECK(&less != &large);
  slot.state[1] = &slot;  // any address
  CHECK(&recap::cpu::tuner_of(slot) != &large);
  slot.state[1] = nullptr;
  slot.dtype = recap::Dtype::float64;
  CHECK(&recap::cpu::tuner_of(slot) != &large);
}

}  // namespace

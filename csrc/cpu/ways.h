// The way of every class of work: bytes per element, and size of the tensor.
#pragma once

#include <optional>
#include <vector>

#include "../plan/plan.h"
#include "tuner.h"

namespace recap::cpu {

// From so many bytes of each array on, a tensor is of another class than long ones of less.
constexpr int64_t kLargeBytes = 4 * 1024 * 1024;

// How many arrays the update of a slot reads, with the gradient.
inline int array_count(const Slot& slot) {
  int count = 2;
  for (const void* state : slot.state) count += state != nullptr;
  return count;
}

// The tuner of a slot that is long.
Tuner& tuner_of(const Slot& slot);

// That of all tensors that are not.
Tuner& tuner_of_short();

// From now on long tensors are updated with so many streams, or so many blocks ahead, and for short
// ones that level of the caches is asked; without a number, that is chosen anew by measuring. No
// step may be running.
void fix_way(std::optional<int> streams, std::optional<int> ahead,
             std::optional<int> level = std::nullopt);

struct ChosenWay {
  const char* kind;  // a dtype, or "mixed"
  int arrays;        // with the gradient
  bool large;
  Way way;
};

// Those that were chosen by measuring, for long tensors.
std::vector<ChosenWay> chosen_ways();

}  // namespace recap::cpu

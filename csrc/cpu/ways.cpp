#include "ways.h"

#include <algorithm>
#include <array>
#include <memory>

namespace recap::cpu {
namespace {

// One stream, eight blocks ahead, was best of those with one stream on an Intel Xeon; asking ahead
// makes an AMD EPYC of the fourth generation slower.
const std::vector<Way> kCandidates = {{1, 8}, {1, 0}, {2, 0}, {2, 8}, {4, 0}};

constexpr int kMostArrays = kMaxStates + 2;

class Tuners {
 public:
  explicit Tuners(const std::vector<Way>& candidates) {
    for (auto& tuner : all_) tuner = std::make_unique<Tuner>(candidates);
  }

  Tuner& of(Dtype dtype, int arrays, bool large) const {
    return *all_[(static_cast<int>(dtype) * (kMostArrays + 1) + arrays) * 2 + large];
  }

 private:
  std::array<std::unique_ptr<Tuner>, kDtypes*(kMostArrays + 1) * 2> all_;
};

std::unique_ptr<Tuners>& tuners() {
  static auto all = std::make_unique<Tuners>(kCandidates);
  return all;
}

}  // namespace

Tuner& tuner_of(const Slot& slot) {
  int arrays = 2;
  for (const void* state : slot.state) arrays += state != nullptr;
  return tuners()->of(slot.dtype, arrays, slot.size * dtype_size(slot.dtype) >= kLargeBytes);
}

void fix_way(std::optional<int> streams, std::optional<int> ahead) {
  std::vector<Way> candidates;
  for (Way way : kCandidates) {
    way = {streams.value_or(way.streams), ahead.value_or(way.ahead)};
    if (std::find(candidates.begin(), candidates.end(), way) == candidates.end()) {
      candidates.push_back(way);
    }
  }
  tuners() = std::make_unique<Tuners>(candidates);
}

std::vector<ChosenWay> chosen_ways() {
  std::vector<ChosenWay> all;
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    for (int arrays = 2; arrays <= kMostArrays; ++arrays) {
      for (const bool large : {false, true}) {
        const Tuner& tuner = tuners()->of(static_cast<Dtype>(dtype), arrays, large);
        const auto way = tuner.has_a_choice() ? tuner.chosen() : std::nullopt;
        if (way) all.push_back({static_cast<Dtype>(dtype), arrays, large, *way});
      }
    }
  }
  return all;
}

}  // namespace recap::cpu

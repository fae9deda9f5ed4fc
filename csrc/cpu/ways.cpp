#include "ways.h"

#include <algorithm>
#include <array>
#include <memory>

#include "kernels.h"

namespace recap::cpu {
namespace {

// One stream, eight blocks ahead, was best of those with one stream on an Intel Xeon; asking ahead
// makes an AMD EPYC of the fourth generation slower, and SGD is fastest there with narrow vectors.
const std::vector<Way> kCandidates = {{1, 8}, {1, 0},       {2, 0},       {2, 8},
                                      {4, 0}, {1, 0, true}, {2, 0, true}, {4, 0, true}};

// The EPYC has short tensors sooner by way of the second level.
const std::vector<Way> kOfShort = {{1, kLead, false, 1}, {1, kLead, false, 2}};

// A dtype, or mixed.
constexpr int kKinds = kDtypes + 1;
constexpr int kMostArrays = kMaxStates + 2;

class Tuners {
 public:
  Tuners(const std::vector<Way>& candidates, const std::vector<Way>& of_short)
      : of_short_(of_short) {
    for (auto& tuner : all_) tuner = std::make_unique<Tuner>(candidates);
  }

  Tuner& of(int kind, int arrays, bool large) const {
    return *all_[(kind * (kMostArrays + 1) + arrays) * 2 + large];
  }
  Tuner& of_short() { return of_short_; }

 private:
  Tuner of_short_;
  std::array<std::unique_ptr<Tuner>, kKinds*(kMostArrays + 1) * 2> all_;
};

// Of `candidates`, as they are with what is fixed, each once.
template <typename Fix>
std::vector<Way> fixed(const std::vector<Way>& candidates, const Fix& fix) {
  std::vector<Way> all;
  for (Way way : candidates) {
    fix(way);
    if (way.narrow && !kernels().narrow) continue;
    if (std::find(all.begin(), all.end(), way) == all.end()) all.push_back(way);
  }
  return all;
}

std::unique_ptr<Tuners> make_tuners(std::optional<int> streams, std::optional<int> ahead,
                                    std::optional<int> level) {
  const auto of_long = [&](Way& way) {
    const bool is_fixed = streams && ahead;
    way = {streams.value_or(way.streams), ahead.value_or(way.ahead), way.narrow && !is_fixed};
  };
  const auto of_short = [&](Way& way) { way.level = level.value_or(way.level); };
  return std::make_unique<Tuners>(fixed(kCandidates, of_long), fixed(kOfShort, of_short));
}

std::unique_ptr<Tuners>& tuners() {
  static auto all = make_tuners(std::nullopt, std::nullopt, std::nullopt);
  return all;
}

}  // namespace

Tuner& tuner_of(const Slot& slot) {
  const bool large = slot.size * dtype_size(slot.dtype) >= kLargeBytes;
  const int kind = slot.format ? kDtypes : static_cast<int>(slot.dtype);
  return tuners()->of(kind, array_count(slot), large);
}

Tuner& tuner_of_short() { return tuners()->of_short(); }

void fix_way(std::optional<int> streams, std::optional<int> ahead, std::optional<int> level) {
  tuners() = make_tuners(streams, ahead, level);
}

std::vector<ChosenWay> chosen_ways() {
  std::vector<ChosenWay> all;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int arrays = 2; arrays <= kMostArrays; ++arrays) {
      for (const bool large : {false, true}) {
        const auto way = tuners()->of(kind, arrays, large).found_best();
        const char* const name = kind == kDtypes ? "mixed" : dtype_name(static_cast<Dtype>(kind));
        if (way) all.push_back({name, arrays, large, *way});
      }
    }
  }
  return all;
}

}  // namespace recap::cpu

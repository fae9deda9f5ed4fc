// The CPU engine against the scalar one: the same bits for every update, type, instruction set,
// size and alignment, and nothing else touched.
#include "cpu/engine.h"

#include <sys/mman.h>

#include <limits>

#include "check.h"
#include "compare.h"
#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/ways.h"
#include "problem.h"
#include "scalar_engine.h"

namespace {

using recap::cpu::ThreadPool;

constexpr int64_t kTile = recap::cpu::kTileSize;

void must_not_run(int, void (*)(int, void*), void*) {
  check::fail(__FILE__, __LINE__, "the pool was used");
}
constexpr ThreadPool kOneThread{1, must_not_run};

std::vector<SlotShape> every_update_and_dtype(int64_t size, int shift) {
  std::vector<SlotShape> shapes;
  for (int update = 0; update < recap::kUpdates; ++update) {
    for (int dtype = 0; dtype < recap::kDtypes; ++dtype) {
      shapes.push_back({static_cast<Update>(update), static_cast<Dtype>(dtype), size, true, shift});
    }
  }
  return shapes;
}

void check_against_scalar(int64_t size, Numbers numbers, bool slow) {
  for (int shift = 0; shift < 4; ++shift) {
    const std::vector<SlotShape> shapes = every_update_and_dtype(size, shift);
    Problem expected(shapes, numbers, slow);
    scalar::run(expected.plan, expected.step);
    for (const std::string& set : recap::cpu::instruction_sets()) {
      CHECK(recap::cpu::use_instruction_set(set));
      Problem found(shapes, numbers, slow);
      recap::cpu::run(found.plan, found.step, kOneThread);
      check_same(found, expected, "instruction set ", set, ", shift ", shift);
    }
  }
  recap::cpu::use_instruction_set("");
}

TEST(every_small_size_has_the_bits_of_the_scalar_engine) {
  for (int64_t size = 0; size <= 33; ++size)
    check_against_scalar(size, Numbers::ordinary, size % 2);
}

TEST(sizes_around_the_block_have_the_bits_of_the_scalar_engine) {
  for (const int64_t size : {511, 512, 513, 1031})
    check_against_scalar(size, Numbers::ordinary, true);
}

TEST(sizes_around_the_tile_have_the_bits_of_the_scalar_engine) {
  for (const int64_t size : {kTile - 1, kTile + 1})
    check_against_scalar(size, Numbers::ordinary, false);
}

TEST(any_bit_pattern_has_the_bits_of_the_scalar_engine) {
  check_against_scalar(4099, Numbers::any, true);
  check_against_scalar(4099, Numbers::any, false);
}

// In short tensors, in long ones in any way, and in rows that are left alone.
TEST(gradients_are_left_at_zero_where_values_say_so) {
  std::vector<SlotShape> shapes = every_update_and_dtype(1031, 1);
  for (int dtype = 0; dtype < recap::kDtypes; ++dtype) {
    const int64_t size = 3 * recap::cpu::kLongBytes / recap::dtype_size(static_cast<Dtype>(dtype));
    shapes.push_back({Update::adam, static_cast<Dtype>(dtype), size + 77});
    shapes.push_back({Update::sgd, static_cast<Dtype>(dtype), size + 5, false});
  }
  Problem expected(shapes, Numbers::ordinary);
  recap::cpu::run(expected.plan, expected.step, kOneThread);
  for (const int streams : {1, 4}) {
    recap::cpu::fix_way(streams, 8);
    for (const std::string& set : recap::cpu::instruction_sets()) {
      CHECK(recap::cpu::use_instruction_set(set));
      Problem found(shapes, Numbers::ordinary);
      for (size_t slot = 0; slot < shapes.size(); slot += 2) {
        found.step.values[slot].clears_grads = true;
      }
      recap::cpu::run(found.plan, found.step, kOneThread);
      for (size_t slot = 0; slot < shapes.size(); ++slot) {
        for (int index = 0; index < kArrays; ++index) {
          if (!found.array(slot, index)) continue;
          Guarded &array = *found.array(slot, index), &other = *expected.array(slot, index);
          const bool cleared = index == 1 && slot % 2 == 0 && shapes[slot].has_grad;
          for (size_t i = 0; i < array.size(); ++i) {
            CHECK_EQ(int{array.data()[i]}, cleared ? 0 : int{other.data()[i]}, set, ", slot ",
                     slot);
          }
        }
      }
      CHECK(found.guards_intact());
    }
  }
  recap::cpu::use_instruction_set("");
  recap::cpu::fix_way(std::nullopt, std::nullopt);
}

// FNV-1a of what an array holds.
void add_to_digest(Guarded& array, uint64_t& digest) {
  for (size_t i = 0; i < array.size(); ++i) digest = (digest ^ array.data()[i]) * 0x100000001b3;
}

// So does x86-64, and any other: a change of an update's arithmetic alone may change the number.
TEST(every_machine_gives_the_same_bits) {
  uint64_t digest = 0xcbf29ce484222325;
  for (const bool slow : {false, true}) {
    const std::vector<SlotShape> shapes = every_update_and_dtype(1031, 1);
    Problem problem(shapes, Numbers::ordinary, slow);
    recap::cpu::run(problem.plan, problem.step, kOneThread);
    for (size_t slot = 0; slot < shapes.size(); ++slot) {
      for (int index = 0; index < kArrays; ++index) {
        if (Guarded* array = problem.array(slot, index)) add_to_digest(*array, digest);
      }
    }
  }
  CHECK_EQ(digest, uint64_t{0x4e1dedbb103315e3});
}

// Long tensors, which are updated in parts and with requests further ahead, between short ones.
TEST(every_way_has_the_bits_of_the_scalar_engine) {
  for (const int64_t rest : {0, 4099}) {
    std::vector<SlotShape> shapes;
    for (int update = 0; update < recap::kUpdates; ++update) {
      const Dtype dtype = static_cast<Dtype>((update + rest % 2) % recap::kDtypes);
      const int64_t size = recap::cpu::kLongBytes / recap::dtype_size(dtype);
      const int64_t sizes[] = {size - 1, 700, 3 * size + rest};
      for (const int64_t each : sizes) {
        shapes.push_back({static_cast<Update>(update), dtype, each, true, update % 4});
      }
    }
    Problem expected(shapes, Numbers::ordinary, true);
    scalar::run(expected.plan, expected.step);
    using recap::cpu::Way;
    for (const Way way : {Way{1, 0}, Way{2, 8}, Way{3, 1, false, 2}, Way{8, 32}}) {
      recap::cpu::fix_way(way.streams, way.ahead, way.level);
      Problem found(shapes, Numbers::ordinary, true);
      recap::cpu::run(found.plan, found.step, kOneThread);
      check_same(found, expected, "streams ", way.streams, ", ahead ", way.ahead, ", rest ", rest);
    }
  }
  recap::cpu::fix_way(std::nullopt, std::nullopt);
}

TEST(a_way_is_chosen_within_some_steps) {
  std::vector<SlotShape> shapes(8, {Update::adam, Dtype::float32, 4 * kTile});
  Problem problem(shapes, Numbers::ordinary, true);
  recap::cpu::fix_way(std::nullopt, std::nullopt);
  const int ways = recap::cpu::kernels().narrow ? 8 : 5, last = 2 + 4 * ways;
  for (int step = 0; step < last + 2; ++step) {  // 8 runs in each, 32 of each way, after two steps
    CHECK(recap::cpu::chosen_ways().empty() == (step < last), "step ", step);
    recap::cpu::run(problem.plan, problem.step, kOneThread);
  }
  const std::vector<recap::cpu::ChosenWay> chosen = recap::cpu::chosen_ways();
  CHECK_EQ(chosen.size(), size_t{1});
  CHECK(std::string(chosen[0].kind) == "float32" && !chosen[0].large);
  CHECK_EQ(chosen[0].arrays, 4);
  recap::cpu::run(problem.plan, problem.step, kOneThread);
  CHECK(recap::cpu::chosen_ways()[0].way == chosen[0].way);
  recap::cpu::fix_way(std::nullopt, std::nullopt);
}

TEST(the_cache_that_is_asked_for_short_tensors_is_chosen_within_some_steps) {
  recap::cpu::fix_way(std::nullopt, std::nullopt);
  const recap::cpu::Tuner& tuner = recap::cpu::tuner_of_short();
  Problem small({{Update::adam, Dtype::float32, 4096}}, Numbers::ordinary, true);
  std::vector<SlotShape> shapes(40, {Update::adam, Dtype::float32, 4096});
  shapes.push_back({Update::adam, Dtype::float32, 4 * kTile});  // a long one between them
  shapes.insert(shapes.end(), 40, {Update::sgd, Dtype::float64, 4096});
  Problem problem(shapes, Numbers::ordinary, true);
  for (int step = 0; step < 2 + 2 * recap::cpu::Tuner::kTrials; ++step) {
    CHECK(!tuner.chosen().has_value(), "step ", step);
    recap::cpu::run(small.plan, small.step, kOneThread);  // too few bytes to tell
    recap::cpu::run(problem.plan, problem.step, kOneThread);
  }
  CHECK(tuner.chosen().has_value());
  recap::cpu::fix_way(std::nullopt, std::nullopt);
}

// A gradient, and the state that takes its square: Adam's second moment, Adagrad's sum.
struct Rare {
  double grad, state;
};

// Where a square, or its distance to a second moment, leaves the range of T or is not a number.
template <typename T>
std::vector<Rare> rare_pairs() {
  using Limits = std::numeric_limits<T>;
  const double large = Limits::max(), tiny = Limits::denorm_min(), root = std::sqrt(large);
  const double infinite = Limits::infinity(), nan = Limits::quiet_NaN();
  std::vector<Rare> pairs;
  // A third of each gradient is squared. Those of 3.1 and 4 roots overflow, or stay below the
  // largest number only with a second moment subtracted.
  for (const double grad : {1.0, tiny, 2.9 * root, 3.1 * root, -4 * root, large, infinite, nan}) {
    for (const double state : {1.0, tiny, 0.5 * large, large, infinite, nan, -large, -infinite}) {
      pairs.push_back({grad, state});
    }
  }
  return pairs;
}

constexpr size_t kRarePairs = 64;

void set_rare(Problem& problem, size_t pair, const std::vector<int64_t>& places) {
  static const std::vector<Rare> in_float = rare_pairs<float>(), in_double = rare_pairs<double>();
  CHECK_EQ(in_float.size(), kRarePairs);
  for (size_t slot = 0; slot < problem.plan.slots.size(); ++slot) {
    const SlotShape& shape = problem.shape(slot);
    const Rare& rare = (shape.dtype == Dtype::float64 ? in_double : in_float)[pair];
    const int states = states_of(shape.update);
    for (const int64_t place : places) {
      problem.set(slot, 1, place, rare.grad);
      if (states > 0) problem.set(slot, states == 1 ? 2 : 3, place, rare.state);
    }
  }
}

void check_rare_against_scalar(size_t pair, bool slow) {
  constexpr int64_t kBlock = 512;             // of 16-bit elements
  constexpr int64_t kSize = kBlock + 16 + 7;  // then vectors, then a rest
  const std::vector<SlotShape> shapes = every_update_and_dtype(kSize, 1);
  // At most one in a vector, each pair at other places.
  std::vector<int64_t> places = {kBlock - 1, kBlock, kSize - 1};
  for (int64_t place = pair % 17; place < kBlock - 16; place += 33) places.push_back(place);
  Problem expected(shapes, Numbers::ordinary, slow);
  set_rare(expected, pair, places);
  scalar::run(expected.plan, expected.step);
  for (const std::string& set : recap::cpu::instruction_sets()) {
    CHECK(recap::cpu::use_instruction_set(set));
    Problem found(shapes, Numbers::ordinary, slow);
    set_rare(found, pair, places);
    recap::cpu::run(found.plan, found.step, kOneThread);
    check_same(found, expected, "instruction set ", set, ", pair ", pair);
  }
  recap::cpu::use_instruction_set("");
}

TEST(a_rare_number_among_ordinary_ones_has_the_bits_of_the_scalar_engine) {
  for (size_t pair = 0; pair < kRarePairs; ++pair) {
    check_rare_against_scalar(pair, true);
    check_rare_against_scalar(pair, false);
  }
}

TEST(slots_without_a_gradient_are_untouched) {
  std::vector<SlotShape> shapes = mixed_shapes();
  Problem found(shapes, Numbers::ordinary);
  recap::cpu::run(found.plan, found.step, kOneThread);
  Problem before(shapes, Numbers::ordinary);
  size_t skipped = 0;
  for (size_t slot = 0; slot < shapes.size(); ++slot) {
    if (shapes[slot].has_grad) continue;
    ++skipped;
    for (int index = 0; index < kArrays; ++index) {
      if (!found.array(slot, index)) continue;
      CHECK(memcmp(found.array(slot, index)->data(), before.array(slot, index)->data(),
                   before.array(slot, index)->size()) == 0,
            "slot ", slot, " array ", index);
    }
  }
  CHECK(skipped >= 5);
}

TEST(gradients_are_only_read) {
  const std::vector<SlotShape> shapes = mixed_shapes();
  Problem found(shapes, Numbers::any), before(shapes, Numbers::any);
  recap::cpu::run(found.plan, found.step, kOneThread);
  for (size_t slot = 0; slot < shapes.size(); ++slot) {
    CHECK(memcmp(found.array(slot, 1)->data(), before.array(slot, 1)->data(),
                 before.array(slot, 1)->size()) == 0,
          "slot ", slot);
  }
}

TEST(a_small_plan_does_not_wake_the_pool) {
  Problem problem(every_update_and_dtype(100, 0), Numbers::ordinary);
  recap::cpu::run(problem.plan, problem.step, {8, must_not_run});
}

TEST(plans_with_nothing_to_do_do_nothing) {
  recap::cpu::run({}, {}, {8, must_not_run});
  Problem empty(every_update_and_dtype(0, 0), Numbers::ordinary);
  recap::cpu::run(empty.plan, empty.step, {8, must_not_run});
  CHECK(empty.guards_intact());
  std::vector<SlotShape> shapes = mixed_shapes();
  for (SlotShape& shape : shapes) shape.has_grad = false;
  Problem idle(shapes, Numbers::ordinary), before(shapes, Numbers::ordinary);
  recap::cpu::run(idle.plan, idle.step, {8, must_not_run});
  check_same(idle, before);
}

TEST(slots_may_share_values_in_any_order) {
  std::vector<SlotShape> shapes;
  for (int i = 0; i < 6; ++i) {
    shapes.push_back({i % 2 ? Update::sgd_nesterov : Update::adam, Dtype::float32, 1000});
  }
  Problem expected(shapes, Numbers::ordinary), found(shapes, Numbers::ordinary);
  scalar::run(expected.plan, expected.step);
  found.step.values = {expected.step.values[1], expected.step.values[0]};
  found.step.values_of_slot = {1, 0, 1, 0, 1, 0};
  recap::cpu::run(found.plan, found.step, kOneThread);
  check_same(found, expected);
}

// Address space that takes memory only where it is written.
class Sparse {
 public:
  explicit Sparse(size_t size) : size_(size) {
    data_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
    if (data_ == MAP_FAILED) throw check::Skip{"no address space for a tensor this large"};
  }
  Sparse(const Sparse&) = delete;
  ~Sparse() { munmap(data_, size_); }

  recap::BFloat16* data() const { return static_cast<recap::BFloat16*>(data_); }

 private:
  size_t size_;
  void* data_;
};

TEST(tiles_beyond_32_bits_are_where_they_should_be) {
  constexpr uint16_t kOne = 0x3f80, kTwo = 0x4000, kMinusOne = 0xbf80;
  constexpr int64_t kFar = (int64_t{1} << 32) + 12345;  // elements: twice as many bytes
  constexpr int64_t kSize = kFar + kTile + 1;
  const Sparse param(kSize * sizeof(recap::BFloat16)), grad(kSize * sizeof(recap::BFloat16));
  recap::Hyper hyper;
  hyper.algorithm = recap::Algorithm::sgd;
  hyper.lr = 1;
  hyper.sgd = {0, 0, 0, false};
  recap::Plan plan;
  plan.slots.resize(1);
  plan.slots[0].param = param.data();
  plan.slots[0].size = kSize;
  plan.slots[0].dtype = Dtype::bfloat16;
  plan.tiles = {{0, kFar, kTile}};
  recap::Step step;
  step.grads = {grad.data()};
  step.values_of_slot = {0};
  step.values = {recap::make_values(hyper, 1, false, 1)};

  // Where the offset would lie in 32 bits of elements or bytes, and around the tile itself.
  const int64_t wrapped = kFar & 0xffffffff, wrapped_bytes = (kFar * 2 & 0xffffffff) / 2;
  for (const int64_t i : {wrapped, wrapped_bytes, kFar - 1, kFar, kFar + kTile - 1, kFar + kTile}) {
    param.data()[i].bits = kOne;
    grad.data()[i].bits = kTwo;
  }
  recap::cpu::run(plan, step, kOneThread);
  for (const int64_t i : {kFar, kFar + kTile - 1})
    CHECK_EQ(param.data()[i].bits, kMinusOne, "at ", i);
  for (const int64_t i : {wrapped, wrapped_bytes, kFar - 1, kFar + kTile}) {
    CHECK_EQ(param.data()[i].bits, kOne, "at ", i);
  }
}

TEST(instruction_sets_are_chosen_by_name) {
  const std::vector<std::string> sets = recap::cpu::instruction_sets();
  CHECK_EQ(sets.front(), "baseline");
  CHECK(recap::cpu::use_instruction_set(""));
  CHECK_EQ(recap::cpu::instruction_set_in_use(), sets.back());
  for (const std::string& set : sets) {
    CHECK(recap::cpu::use_instruction_set(set));
    CHECK_EQ(recap::cpu::instruction_set_in_use(), set);
  }
  CHECK(recap::cpu::use_instruction_set("baseline"));
  CHECK(!recap::cpu::use_instruction_set("avx1024"));
  CHECK_EQ(recap::cpu::instruction_set_in_use(), "baseline");
  CHECK(recap::cpu::use_instruction_set(""));
  CHECK_EQ(recap::cpu::instruction_set_in_use(), sets.back());
}

}  // namespace

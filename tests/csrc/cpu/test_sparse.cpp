// Sparse gradients against their sums, one row after the other, in the scalar engine: the same bits
// for any type, instruction set and number of threads, and rows without lookups untouched.
#include <thread>
#include <type_traits>

#include "check.h"
#include "compare.h"
#include "cpu/engine.h"
#include "cpu/grad_norm.h"
#include "cpu/sparse.h"
#include "problem.h"
#include "scalar_engine.h"

namespace {

using recap::cpu::ThreadPool;

void run_on_threads(int count, void (*task)(int, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(task, i, context);
  for (std::thread& thread : threads) thread.join();
}

constexpr Update kUpdatesOfSparse[] = {Update::adam, Update::adam_amsgrad_l2, Update::adagrad,
                                       Update::sgd};

// A slot of wide numbers beside that of the type: the scalar engine on float or double rows of what
// the rows hold gives what they must hold, rounded once.
template <typename T>
class Table {
 public:
  using C = typename recap::Compute<T>::type;

  Table(Update update, Dtype dtype, int64_t rows, int64_t width, int64_t lookups)
      : width_(width), states_(states_of(update)), random_(9) {
    for (int array = 0; array < 1 + states_; ++array) {
      arrays_.push_back(std::make_unique<Guarded>(rows * width * sizeof(T), array * sizeof(T)));
      for (int64_t i = 0; i < rows * width; ++i) set(array, i, array >= 1);
    }
    arrays_.push_back(std::make_unique<Guarded>(lookups * width * sizeof(T), sizeof(T)));
    for (int64_t i = 0; i < lookups * width; ++i) set(1 + states_, i, false);
    for (int64_t i = 0; i < lookups; ++i) {
      // Some rows often.
      looked_up.push_back(static_cast<int64_t>(random_() % (random_() % 2 ? rows : 1 + rows / 8)));
    }
    recap::Slot slot;
    slot.size = rows * width;
    slot.dtype = dtype;
    slot.param = data(0);
    for (int k = 0; k < states_; ++k) slot.state[k] = data(1 + k);
    plan.slots = {slot};
    plan.tiles = recap::cut_tiles(plan.slots, recap::cpu::kTileSize);
    CHECK(sorted_.take(looked_up.data(), lookups, rows));
    step.grads = {nullptr};
    step.values_of_slot = {0};
    step.values = {recap::make_values(hyper_for(update, true), 3, false, 3)};
    step.sparse = {{0, width, data(1 + states_), &sorted_}};
  }

  recap::Plan plan;
  recap::Step step;
  std::vector<int64_t> looked_up;

  std::vector<C> sum_of_row(int64_t row) {
    std::vector<C> sum(width_, C(0));
    bool first = true;
    for (size_t i = 0; i < looked_up.size(); ++i) {
      if (looked_up[i] != row) continue;
      for (int64_t k = 0; k < width_; ++k) {
        const C value = recap::load(element(1 + states_, static_cast<int64_t>(i) * width_ + k));
        sum[k] = first ? value : sum[k] + value;
      }
      first = false;
    }
    return sum;
  }

  void run_scalar() {
    std::vector<int64_t> touched = looked_up;
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    for (const int64_t row : touched) {
      const std::vector<C> grad = sum_of_row(row);
      std::vector<std::vector<C>> wide(1 + states_, std::vector<C>(width_));
      for (int array = 0; array < 1 + states_; ++array) {
        for (int64_t k = 0; k < width_; ++k) {
          wide[array][k] = recap::load(element(array, row * width_ + k));
        }
      }
      recap::Slot slot;
      slot.dtype = std::is_same_v<C, double> ? recap::Dtype::float64 : recap::Dtype::float32;
      slot.size = width_;
      slot.param = wide[0].data();
      for (int k = 0; k < states_; ++k) slot.state[k] = wide[1 + k].data();
      scalar::update(step.values[0], slot, grad.data());
      for (int array = 0; array < 1 + states_; ++array) {
        for (int64_t k = 0; k < width_; ++k) {
          recap::store(wide[array][k], element(array, row * width_ + k));
        }
      }
    }
  }

  bool intact() {
    for (const auto& array : arrays_) {
      if (!array->intact()) return false;
    }
    return true;
  }

  bool same_as(Table& other) {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      if (memcmp(arrays_[i]->data(), other.arrays_[i]->data(), arrays_[i]->size()) != 0) {
        return false;
      }
    }
    return true;
  }

 private:
  unsigned char* data(int array) { return arrays_[array]->data(); }
  T& element(int array, int64_t i) { return reinterpret_cast<T*>(data(array))[i]; }
  void set(int array, int64_t i, bool not_negative) {
    const double value = static_cast<double>(static_cast<int64_t>(random_())) * 0x1p-62;
    recap::store(static_cast<C>(not_negative ? std::fabs(value) : value), element(array, i));
  }

  int64_t width_;
  int states_;
  std::vector<std::unique_ptr<Guarded>> arrays_;
  recap::Lookups sorted_;
  std::mt19937_64 random_;
};

template <typename T>
void check_table(Dtype dtype, int64_t rows, int64_t width, int64_t lookups, int threads) {
  const ThreadPool pool{threads, run_on_threads};
  for (const Update update : kUpdatesOfSparse) {
    Table<T> expected(update, dtype, rows, width, lookups);
    expected.run_scalar();
    for (const std::string& set : recap::cpu::instruction_sets()) {
      CHECK(recap::cpu::use_instruction_set(set));
      Table<T> found(update, dtype, rows, width, lookups);
      recap::cpu::sort_lookups(found.step, pool);
      recap::cpu::run(found.plan, found.step, pool);
      CHECK(found.same_as(expected), "update ", static_cast<int>(update), " dtype ",
            static_cast<int>(dtype), " width ", width, " instruction set ", set, " threads ",
            threads);
      CHECK(found.intact(), "a guard zone was written: width ", width);
    }
  }
  recap::cpu::use_instruction_set("");
}

void check_tables(int64_t rows, int64_t width, int64_t lookups, int threads = 1) {
  check_table<float>(Dtype::float32, rows, width, lookups, threads);
  check_table<double>(Dtype::float64, rows, width, lookups, threads);
  check_table<recap::BFloat16>(Dtype::bfloat16, rows, width, lookups, threads);
  check_table<recap::Float16>(Dtype::float16, rows, width, lookups, threads);
}

TEST(every_width_has_the_bits_of_summed_rows) {
  for (const int64_t width : {1, 3, 16, 64, 67, 513}) check_tables(40, width, 60);
}

TEST(few_lookups_have_the_bits_of_summed_rows) {
  for (const int64_t lookups : {0, 1, 2}) check_tables(9, 16, lookups);
}

TEST(any_number_of_threads_gives_the_same_bits) {
  for (const int threads : {2, 3, 8}) check_tables(3000, 64, 3000, threads);
}

TEST(several_tables_are_shared_by_the_threads) {
  constexpr int64_t kRows[] = {2000, 1, 700}, kLookups[] = {2500, 900, 0}, kWidth = 64;
  for (const int threads : {1, 2, 5}) {
    recap::Plan plan;
    recap::Step step;
    std::vector<std::unique_ptr<Table<float>>> found, expected;
    for (uint32_t i = 0; i < 3; ++i) {
      const auto make = [&] {
        return std::make_unique<Table<float>>(Update::adagrad, Dtype::float32, kRows[i], kWidth,
                                              kLookups[i]);
      };
      expected.push_back(make());
      expected.back()->run_scalar();
      found.push_back(make());
      plan.slots.push_back(found.back()->plan.slots[0]);
      step.grads.push_back(nullptr);
      step.values_of_slot.push_back(0);
      step.sparse.push_back(found.back()->step.sparse[0]);
      step.sparse.back().slot = i;
    }
    step.values = found[0]->step.values;
    plan.tiles = recap::cut_tiles(plan.slots, recap::cpu::kTileSize);
    const ThreadPool pool{threads, run_on_threads};
    recap::cpu::sort_lookups(step, pool);
    recap::cpu::run(plan, step, pool);
    for (int i = 0; i < 3; ++i) CHECK(found[i]->same_as(*expected[i]), "table ", i);
  }
}

TEST(the_norm_is_that_of_summed_rows) {
  constexpr int64_t kRows = 900, kWidth = 48, kLookups = 1500;
  double first = 0.0;
  for (const int threads : {1, 3}) {
    Table<recap::BFloat16> table(Update::sgd, Dtype::bfloat16, kRows, kWidth, kLookups);
    const ThreadPool pool{threads, run_on_threads};
    recap::cpu::sort_lookups(table.step, pool);
    recap::cpu::GradNorm norm;
    const double found = norm.sums_of_squares(table.plan, table.step, {0}, 1, pool)[0];
    double expected = 0.0;
    for (int64_t row = 0; row < kRows; ++row) {
      for (const double element : table.sum_of_row(row)) expected += element * element;
    }
    CHECK(std::fabs(found - expected) <= 1e-12 * expected, found, " not ", expected);
    if (threads == 1) first = found;
    CHECK_EQ(found, first);
  }
}

TEST(other_tiles_of_the_plan_are_updated_too) {
  Table<float> table(Update::adagrad, Dtype::float32, 40, 16, 60);
  Table<float> expected(Update::adagrad, Dtype::float32, 40, 16, 60);
  expected.run_scalar();
  Problem dense({{Update::adagrad, Dtype::float32, 3 * recap::cpu::kTileSize + 5}},
                Numbers::ordinary);
  Problem dense_expected({{Update::adagrad, Dtype::float32, 3 * recap::cpu::kTileSize + 5}},
                         Numbers::ordinary);
  scalar::run(dense_expected.plan, dense_expected.step);
  recap::Plan plan;
  plan.slots = {table.plan.slots[0], dense.plan.slots[0]};
  plan.tiles = recap::cut_tiles(plan.slots, recap::cpu::kTileSize);
  recap::Step step = table.step;
  step.grads = {nullptr, dense.step.grads[0]};
  step.values_of_slot = {0, 1};
  step.values.push_back(dense.step.values[0]);
  const ThreadPool pool{2, run_on_threads};
  recap::cpu::sort_lookups(step, pool);
  recap::cpu::run(plan, step, pool);
  CHECK(table.same_as(expected));
  check_same(dense, dense_expected);
}

TEST(tiles_without_a_gradient_are_passed_by) {
  for (const int64_t size : {int64_t{1}, recap::cpu::kTileSize, 7 * recap::cpu::kTileSize + 3}) {
    recap::Slot slot;
    slot.size = size;
    const std::vector<recap::Tile> tiles = recap::cut_tiles({slot}, recap::cpu::kTileSize);
    for (size_t i = 0; i < tiles.size(); ++i) {
      CHECK_EQ(recap::tiles_left(slot, tiles[i]), tiles.size() - i);
    }
  }
}

}  // namespace

// Updates of whole rows against a slow, obvious loop over rows: the same bits for every update,
// type, instruction set and width, and rows with a gradient of zero untouched.
#include <thread>

#include "check.h"
#include "compare.h"
#include "cpu/engine.h"
#include "problem.h"
#include "scalar_engine.h"

namespace {

using recap::cpu::ThreadPool;

constexpr int kUpdates = recap::kRowUpdates;

template <bool kL2, typename T>
void scalar_rowwise(const recap::Values& values, T* param, const T* grad,
                    typename recap::Compute<T>::type& sum, int64_t size) {
  using C = typename recap::Compute<T>::type;
  using Algorithm = recap::RowwiseAdagrad<kL2>;
  const auto& h = values.in<C>().template of<Algorithm>();
  C lanes[Algorithm::kLanes] = {};
  for (int64_t i = 0; i < size; ++i) {
    const C g = Algorithm::gradient(h, recap::load(grad[i]), recap::load(param[i]));
    lanes[i % Algorithm::kLanes] += g * g;
  }
  const C multiplier = Algorithm::take(h, Algorithm::total(lanes), static_cast<C>(size), sum);
  for (int64_t i = 0; i < size; ++i) {
    recap::store(Algorithm::update(h, multiplier, recap::load(grad[i]), recap::load(param[i])),
                 param[i]);
  }
}

// A table of rows, of which some have a gradient of zero, and its update.
template <typename T>
class Table {
 public:
  using C = typename recap::Compute<T>::type;

  Table(recap::Update update, Dtype dtype, int64_t rows, int64_t width)
      : update_(update), width_(width), random_(7) {
    const bool is_rowwise = static_cast<int>(update) >= recap::kUpdates;
    states_ = is_rowwise ? 1 : states_of(update);
    for (int array = 0; array < 2 + states_; ++array) {
      const bool of_rows = is_rowwise && array == 2;
      const int64_t size = of_rows ? rows : rows * width;
      const size_t element = of_rows ? sizeof(C) : sizeof(T);
      arrays_.push_back(std::make_unique<Guarded>(size * element, array % 3 * sizeof(T)));
      for (int64_t i = 0; i < size; ++i) {
        const double value = static_cast<double>(static_cast<int64_t>(random_())) * 0x1p-62;
        if (of_rows) {
          reinterpret_cast<C*>(data(array))[i] = static_cast<C>(std::fabs(value));
        } else {
          set(array, i, array >= 2 ? std::fabs(value) : value);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      touched_.push_back(random_() % 3 != 0);
      if (touched_.back()) continue;
      for (int64_t i = 0; i < width; ++i) set(1, row * width + i, random_() % 2 ? 0.0 : -0.0);
      // Rows that differ from zero in one element, the last or the first.
      if (random_() % 2) {
        touched_.back() = true;
        set(1, row * width + (random_() % 2 ? width - 1 : 0), random_() % 2 ? 0x1p-149 : 1.0);
        touched_.back() = !is_zero(row);
      }
    }
    recap::Slot slot;
    slot.size = rows * width;
    slot.row_size = width;
    slot.dtype = dtype;
    slot.param = data(0);
    for (int k = 0; k < states_; ++k) slot.state[k] = data(2 + k);
    plan.slots = {slot};
    plan.tiles = recap::cut_tiles(plan.slots, recap::cpu::kTileSize);
    step.grads = {data(1)};
    step.values_of_slot = {0};
    step.values = {recap::make_values(hyper(), 3, false, 3)};
  }

  recap::Plan plan;
  recap::Step step;

  void run_scalar() {
    for (size_t row = 0; row < touched_.size(); ++row) {
      if (!touched_[row]) continue;
      const int64_t at = static_cast<int64_t>(row) * width_;
      const T* const grad = reinterpret_cast<const T*>(data(1)) + at;
      T* const param = reinterpret_cast<T*>(data(0)) + at;
      if (update_ == Update::rowwise_adagrad) {
        scalar_rowwise<false, T>(step.values[0], param, grad, row_sum(row), width_);
      } else if (update_ == Update::rowwise_adagrad_l2) {
        scalar_rowwise<true, T>(step.values[0], param, grad, row_sum(row), width_);
      } else {
        recap::Slot slot = plan.slots[0];
        slot.size = width_;
        slot.param = param;
        for (int k = 0; k < states_; ++k) slot.state[k] = reinterpret_cast<T*>(data(2 + k)) + at;
        scalar::update(step.values[0], slot, grad);
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
  C& row_sum(size_t row) { return reinterpret_cast<C*>(data(2))[row]; }
  void set(int array, int64_t i, double value) {
    T stored;
    recap::store(static_cast<C>(value), stored);
    memcpy(data(array) + i * sizeof(T), &stored, sizeof stored);
  }
  bool is_zero(int64_t row) {
    for (int64_t i = 0; i < width_; ++i) {
      if (recap::load(reinterpret_cast<const T*>(data(1))[row * width_ + i]) != 0) return false;
    }
    return true;
  }
  recap::Hyper hyper() const {
    if (static_cast<int>(update_) < recap::kUpdates) return hyper_for(update_, true);
    recap::Hyper hyper;
    hyper.algorithm = recap::Algorithm::rowwise_adagrad;
    hyper.lr = 0.1;
    hyper.rowwise_adagrad = {1e-8, 0.125, update_ == Update::rowwise_adagrad};
    return hyper;
  }

  recap::Update update_;
  int64_t width_;
  int states_;
  std::vector<std::unique_ptr<Guarded>> arrays_;
  std::vector<bool> touched_;
  std::mt19937_64 random_;
};

void run_on_threads(int count, void (*task)(int, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(task, i, context);
  for (std::thread& thread : threads) thread.join();
}

template <typename T>
void check_table(Dtype dtype, int64_t rows, int64_t width, int threads) {
  for (int i = 0; i < kUpdates; ++i) {
    const auto update = static_cast<Update>(i);
    Table<T> expected(update, dtype, rows, width);
    expected.run_scalar();
    for (const std::string& set : recap::cpu::instruction_sets()) {
      CHECK(recap::cpu::use_instruction_set(set));
      Table<T> found(update, dtype, rows, width);
      recap::cpu::run(found.plan, found.step, {threads, run_on_threads});
      CHECK(found.same_as(expected), "update ", i, " dtype ", static_cast<int>(dtype), " width ",
            width, " instruction set ", set, " threads ", threads);
      CHECK(found.intact(), "a guard zone was written: update ", i, " width ", width);
    }
  }
  recap::cpu::use_instruction_set("");
}

void check_tables(int64_t rows, int64_t width, int threads = 1) {
  check_table<float>(Dtype::float32, rows, width, threads);
  check_table<double>(Dtype::float64, rows, width, threads);
  check_table<recap::BFloat16>(Dtype::bfloat16, rows, width, threads);
  check_table<recap::Float16>(Dtype::float16, rows, width, threads);
}

TEST(narrow_rows_have_the_bits_of_the_scalar_loop) {
  for (const int64_t width : {1, 2, 3, 15, 16, 17, 33}) check_tables(37, width);
}

TEST(usual_rows_have_the_bits_of_the_scalar_loop) {
  for (const int64_t width : {64, 67, 128}) check_tables(41, width);
}

TEST(rows_around_blocks_and_tiles_have_the_bits_of_the_scalar_loop) {
  for (const int64_t width : {511, 513, 8191, 9001}) check_tables(3, width);
}

TEST(threads_share_the_rows) { check_tables(6000, 16, 3); }

}  // namespace

#include "sparse.h"

#include <algorithm>

#include "float_mode.h"
#include "row_kernels.h"
#include "rows.h"

namespace recap::cpu {
namespace {

// Below this many bytes of parameters for each thread, waking it costs more than it saves.
constexpr int64_t kMinBytesPerThread = 64 * 1024;

// So much of a table's rows is asked for ahead: enough that memory answers in time, and little
// enough that all of it is in the cache when its turn comes.
constexpr int64_t kBytesAhead = 2048;
constexpr int64_t kMinRowsAhead = 4, kMaxRowsAhead = 32;

constexpr int64_t kRowsOfSum = 256;  // in one sum of squares

const Slot& slot_of(const Plan& plan, const SparseGradient& gradient) {
  return plan.slots[gradient.slot];
}

int64_t row_bytes(const Plan& plan, const SparseGradient& gradient) {
  return gradient.row_size * dtype_size(slot_of(plan, gradient).dtype);
}

// Runs task(index, context) on so many threads, which treat denormal numbers as this one does.
template <typename Task>
void run_on(const ThreadPool& pool, int count, const Task& task) {
  if (count <= 1) {
    if (count == 1) task(0);
    return;
  }
  struct Context {
    const Task& task;
    FloatMode mode;
  } context{task, float_mode()};
  pool.run(
      count,
      [](int index, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        const FlushingAs caller(c.mode);
        c.task(index);
      },
      &context);
}

// Goes through the touched rows of one gradient, each with the sum of what its lookups add.
class TouchedRows {
 public:
  TouchedRows(const Kernels& kernels, const Plan& plan, const SparseGradient& gradient,
              Update update)
      : lookups_(*gradient.lookups),
        arrays_(slot_of(plan, gradient), gradient.row_size, update),
        row_size_(gradient.row_size),
        values_of_lookups_(static_cast<const char*>(gradient.values)),
        add_(kernels.rows->add[static_cast<int>(slot_of(plan, gradient).dtype)]) {}

  // Calls visit(row, grad, is_sum) for rows [begin, end) of the lookups. A row of one lookup has
  // its values as they are, others a sum in the type of the update.
  template <bool kUpdates, typename Visit>
  void each(int64_t begin, int64_t end, const Visit& visit) const {
    const int64_t ahead =
        std::clamp(kBytesAhead / arrays_.row_bytes(), kMinRowsAhead, kMaxRowsAhead);
    for (int64_t i = begin; i < std::min(begin + ahead, end); ++i) ask_for<kUpdates>(i);
    for (int64_t i = begin; i < end; ++i) {
      if (i + ahead < end) ask_for<kUpdates>(i + ahead);
      const int64_t first = lookups_.first(i), last = lookups_.first(i + 1);
      if (last - first == 1) {
        visit(lookups_.row(i), values_of(first), false);
        continue;
      }
      void* const sum = buffer();
      for (int64_t lookup = first; lookup < last; ++lookup) {
        add_(values_of(lookup), lookup == first, sum, row_size_);
      }
      visit(lookups_.row(i), sum, true);
    }
  }

  const RowArrays& arrays() const { return arrays_; }

 private:
  const char* values_of(int64_t lookup) const {
    return values_of_lookups_ + lookups_.place(lookup) * arrays_.row_bytes();
  }

  template <bool kUpdates>
  void ask_for(int64_t i) const {
    if (kUpdates) arrays_.prefetch(lookups_.row(i));
    const char* const grad = values_of(lookups_.first(i));
    for (int64_t line = 0; line < arrays_.row_bytes(); line += 64) {
      __builtin_prefetch(grad + line);
    }
  }

  void* buffer() const {
    thread_local std::vector<double> sum;  // kept, so that a step allocates nothing
    if (sum.size() < static_cast<size_t>(row_size_)) sum.resize(row_size_);
    return sum.data();
  }

  const Lookups& lookups_;
  const RowArrays arrays_;
  const int64_t row_size_;
  const char* const values_of_lookups_;
  const AddRow add_;
};

void update_rows(const Kernels& kernels, const Plan& plan, const Step& step,
                 const SparseGradient& gradient, int64_t begin, int64_t end) {
  const Values& values = step.values[step.values_of_slot[gradient.slot]];
  const TouchedRows rows(kernels, plan, gradient, values.update);
  const Dtype dtype = slot_of(plan, gradient).dtype;
  const int at = static_cast<int>(dtype), update = static_cast<int>(values.update);
  const RowKernels& of_rows = *kernels.rows;
  if (update >= kUpdates) {
    const bool has_l2 = values.update == Update::rowwise_adagrad_l2;
    const RowKernel of_one = (has_l2 ? of_rows.rowwise_adagrad_l2 : of_rows.rowwise_adagrad)[at];
    const RowKernel of_sum =
        (has_l2 ? of_rows.rowwise_adagrad_l2_of_sum : of_rows.rowwise_adagrad_of_sum)[at];
    rows.each<true>(begin, end, [&](int64_t row, const void* grad, bool is_sum) {
      (is_sum ? of_sum : of_one)(values, rows.arrays().at(row, grad));
    });
    return;
  }
  const Kernel of_one = kernels.of[at][update];
  const bool is_wide = dtype == Dtype::float32 || dtype == Dtype::float64;
  const Kernel of_sum = is_wide ? of_one : of_rows.of_sum[at][update];
  Prefetch none = Prefetch::none();
  rows.each<true>(begin, end, [&](int64_t row, const void* grad, bool is_sum) {
    (is_sum ? of_sum : of_one)(values, rows.arrays().at(row, grad), none);
  });
}

// What the first rows of a gradient cost, in bytes that move.
class Cost {
 public:
  Cost(const Plan& plan, const SparseGradient& gradient)
      : lookups_(*gradient.lookups), row_bytes_(row_bytes(plan, gradient)) {
    const Slot& slot = slot_of(plan, gradient);
    for (const void* state : slot.state) arrays_ += state != nullptr;
  }
  int64_t of_first(int64_t rows) const {
    return row_bytes_ * (2 * arrays_ * rows + lookups_.first(rows));
  }
  int64_t total() const { return of_first(lookups_.rows()); }

  // How many rows cost at most so much.
  int64_t rows_for(int64_t cost) const {
    int64_t few = 0, many = lookups_.rows() + 1;
    if (cost < 0) return 0;
    while (many - few > 1) {
      const int64_t middle = few + (many - few) / 2;
      (of_first(middle) <= cost ? few : many) = middle;
    }
    return few;
  }

 private:
  const Lookups& lookups_;
  int64_t row_bytes_, arrays_ = 1;
};

int threads_for(const Plan& plan, const Step& step, const ThreadPool& pool) {
  int64_t bytes = 0;
  for (const SparseGradient& gradient : step.sparse) {
    bytes += gradient.lookups->rows() * row_bytes(plan, gradient);
  }
  return static_cast<int>(
      std::clamp(bytes / kMinBytesPerThread, int64_t{1}, std::max<int64_t>(pool.threads, 1)));
}

}  // namespace

void sort_lookups(const Step& step, const ThreadPool& pool) {
  const auto count = static_cast<int>(step.sparse.size());
  const int threads = std::min(pool.threads, count);
  run_on(pool, threads, [&](int thread) {
    for (int i = thread; i < count; i += threads) step.sparse[i].lookups->sort();
  });
}

void run_sparse(const Plan& plan, const Step& step, const ThreadPool& pool) {
  int64_t total = 0;
  for (const SparseGradient& gradient : step.sparse) total += Cost(plan, gradient).total();
  const int threads = threads_for(plan, step, pool);
  run_on(pool, threads, [&](int thread) {
    // Of the rows of all gradients, one after the other, an equal share.
    const auto bound = [&](int t) { return total / threads * t + total % threads * t / threads; };
    const int64_t begin = bound(thread), end = bound(thread + 1);
    int64_t before = 0;
    for (const SparseGradient& gradient : step.sparse) {
      const Cost cost(plan, gradient);
      const int64_t first = cost.rows_for(begin - before);
      const int64_t last = cost.rows_for(end - before);
      if (first < last) update_rows(kernels(), plan, step, gradient, first, last);
      before += cost.total();
    }
  });
}

void sums_of_squares_of_rows(const Plan& plan, const Step& step, const ThreadPool& pool,
                             std::vector<double>& sums, std::vector<size_t>& ends) {
  ends.clear();
  size_t end = 0;
  for (const SparseGradient& gradient : step.sparse) {
    end += (gradient.lookups->rows() + kRowsOfSum - 1) / kRowsOfSum;
    ends.push_back(end);
  }
  sums.assign(end, 0.0);
  const int threads = threads_for(plan, step, pool);
  run_on(pool, threads, [&](int thread) {
    size_t sum = 0;
    for (const SparseGradient& gradient : step.sparse) {
      const Dtype dtype = slot_of(plan, gradient).dtype;
      const auto wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
      // Neither parameter nor states are read, whatever the update.
      const TouchedRows rows(kernels(), plan, gradient, Update::sgd);
      for (int64_t begin = 0; begin < gradient.lookups->rows(); begin += kRowsOfSum, ++sum) {
        if (static_cast<int>(sum % threads) != thread) continue;
        const int64_t stop = std::min(begin + kRowsOfSum, gradient.lookups->rows());
        double& own = sums[sum];
        rows.each<false>(begin, stop, [&](int64_t, const void* grad, bool is_sum) {
          const Dtype type = is_sum ? wide : dtype;
          own += kernels().sum_of_squares[static_cast<int>(type)](grad, gradient.row_size);
        });
      }
    }
  });
}

}  // namespace recap::cpu

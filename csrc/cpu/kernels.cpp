// The loops over one tile, compiled once per instruction set (RECAP_INSTRUCTION_SET).
#include "kernels.h"

#include "loops.h"
#include "row_kernels.h"

namespace recap::cpu {
namespace {

// A block at a time, small enough to stay in the first-level cache.
template <typename Algorithm>
void update_wide(const Values& values, const Arrays& arrays, Prefetch& prefetch) {
  Float16* const param = static_cast<Float16*>(arrays.param);
  const Float16* const grad = static_cast<const Float16*>(arrays.grad);
  constexpr int64_t kMost = kTurnBytes / sizeof(Float16);
  alignas(64) float wide_param[kMost], wide_grad[kMost], wide_state[kMaxStates][kMost];
  // Not inlined: called in three places, and long.
  const auto update = [&](int64_t begin, int64_t count) __attribute__((noinline)) {
    load_all(param + begin, wide_param, count);
    load_all(grad + begin, wide_grad, count);
    for (int k = 0; k < Algorithm::kStates; ++k) {
      load_all(static_cast<const Float16*>(arrays.state[k]) + begin, wide_state[k], count);
    }
    update_in_cache<Algorithm, float>(values, wide_param, wide_grad, wide_state[0], wide_state[1],
                                      wide_state[2], count);
    store_all(wide_param, param + begin, count);
    for (int k = 0; k < Algorithm::kStates; ++k) {
      store_all(wide_state[k], static_cast<Float16*>(arrays.state[k]) + begin, count);
    }
  };
  for_blocks<Algorithm, Float16>(arrays, prefetch, update);
}

template <typename Algorithm, typename T>
void kernel(const Values& values, const Arrays& arrays, Prefetch& prefetch) {
  if constexpr (__is_same(T, Float16)) {
    update_wide<Algorithm>(values, arrays, prefetch);
  } else {
    T* __restrict const param = static_cast<T*>(arrays.param);
    const T* __restrict const grad = static_cast<const T*>(arrays.grad);
    T* __restrict const state0 = static_cast<T*>(arrays.state[0]);
    T* __restrict const state1 = static_cast<T*>(arrays.state[1]);
    T* __restrict const state2 = static_cast<T*>(arrays.state[2]);
    with_values<Algorithm, T>(values, [&](const auto& h) __attribute__((always_inline)) {
      for_blocks<Algorithm, T>(
          arrays, prefetch, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
            update_range<Algorithm>(h, param, grad, state0, state1, state2, begin, begin + count);
          });
    });
  }
}

// Vectors of a size of their own, which the compiler splits into those that there are.
template <typename T>
struct Eight {
  typedef T type __attribute__((vector_size(8 * sizeof(T))));
};

template <typename T>
RECAP_INLINE void add_squares_of_eight(const T* from, typename Eight<double>::type& lanes) {
  typename Eight<T>::type values;
  memcpy(&values, from, sizeof values);
  const auto x = __builtin_convertvector(values, typename Eight<double>::type);
  lanes += x * x;
}

// Reads four quarters at once: one thread gets more of the memory's bandwidth from several streams
// than from one. Which lane an element is added in follows from `size` alone.
template <typename T>
RECAP_INLINE void add_squares(const T* elements, int64_t size, Eight<double>::type (&lanes)[4]) {
  const int64_t quarter = size / 32 * 8;
  for (int64_t i = 0; i < quarter; i += 8) {
    for (int k = 0; k < 4; ++k) add_squares_of_eight(elements + k * quarter + i, lanes[k]);
  }
  for (int64_t i = 4 * quarter; i < size; ++i) {
    const double x = elements[i];
    lanes[i / 8 % 4][i % 8] += x * x;
  }
}

template <typename T>
double sum_of_squares(const void* elements, int64_t size) {
  const T* const all = static_cast<const T*>(elements);
  Eight<double>::type lanes[4] = {};
  if constexpr (__is_same(T, Float16) || __is_same(T, BFloat16)) {
    constexpr int64_t kBlock = 512;
    alignas(64) float wide[kBlock];
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const int64_t count = size - begin < kBlock ? size - begin : kBlock;
      load_all(all + begin, wide, count);
      add_squares(wide, count, lanes);
    }
  } else {
    add_squares(all, size, lanes);
  }
  const Eight<double>::type eight = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  double sum = 0.0;
  for (int lane = 0; lane < 8; ++lane) sum += eight[lane];
  return sum;
}

template <typename T>
constexpr void fill(Kernel (&row)[kUpdates]) {
#define RECAP_KERNEL(name, ...) \
  row[static_cast<int>(Update::name)] = kernel<typename UpdateType<Update::name>::type, T>;
  RECAP_ELEMENT_UPDATES(RECAP_KERNEL)
#undef RECAP_KERNEL
}

constexpr Kernels make_kernels(const char* instruction_set) {
  Kernels kernels{};
  kernels.instruction_set = instruction_set;
  fill<float>(kernels.of[static_cast<int>(Dtype::float32)]);
  fill<double>(kernels.of[static_cast<int>(Dtype::float64)]);
  fill<BFloat16>(kernels.of[static_cast<int>(Dtype::bfloat16)]);
  fill<Float16>(kernels.of[static_cast<int>(Dtype::float16)]);
  kernels.sum_of_squares[static_cast<int>(Dtype::float32)] = sum_of_squares<float>;
  kernels.sum_of_squares[static_cast<int>(Dtype::float64)] = sum_of_squares<double>;
  kernels.sum_of_squares[static_cast<int>(Dtype::bfloat16)] = sum_of_squares<BFloat16>;
  kernels.sum_of_squares[static_cast<int>(Dtype::float16)] = sum_of_squares<Float16>;
  kernels.rows = &RECAP_TABLE(row_kernels);
  return kernels;
}

}  // namespace

#define RECAP_QUOTE(set) #set
#define RECAP_NAME(set) RECAP_QUOTE(set)

extern const Kernels RECAP_TABLE(kernels);
const Kernels RECAP_TABLE(kernels) = make_kernels(RECAP_NAME(RECAP_INSTRUCTION_SET));

}  // namespace recap::cpu

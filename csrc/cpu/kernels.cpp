// The loops over one tile, compiled once per instruction set (RECAP_INSTRUCTION_SET).
#include "kernels.h"

#include "loops.h"
#include "row_kernels.h"

namespace recap::cpu {
namespace {

// A block at a time, small enough to stay in the first-level cache.
template <typename Algorithm>
void update_wide(const Values& values, Float16* param, const Float16* grad, Float16* const* state,
                 int64_t size, Prefetch& prefetch) {
  constexpr int64_t kBlock = kBlockBytes / sizeof(Float16);
  alignas(64) float wide_param[kBlock], wide_grad[kBlock], wide_state[kMaxStates][kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = size - begin < kBlock ? size - begin : kBlock;
    prefetch.next_block();
    load_all(param + begin, wide_param, count);
    load_all(grad + begin, wide_grad, count);
    for (int k = 0; k < Algorithm::kStates; ++k) load_all(state[k] + begin, wide_state[k], count);
    NoRequests in_cache;
    update_all<Algorithm, float>(values, wide_param, wide_grad, wide_state[0], wide_state[1],
                                 wide_state[2], count, in_cache);
    store_all(wide_param, param + begin, count);
    for (int k = 0; k < Algorithm::kStates; ++k) store_all(wide_state[k], state[k] + begin, count);
  }
}

template <typename Algorithm, typename T>
void kernel(const Values& values, const Arrays& arrays, Prefetch& prefetch) {
  T* param = static_cast<T*>(arrays.param);
  const T* grad = static_cast<const T*>(arrays.grad);
  T* state[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) state[k] = static_cast<T*>(arrays.state[k]);
  if constexpr (__is_same(T, Float16)) {
    update_wide<Algorithm>(values, param, grad, state, arrays.size, prefetch);
  } else {
    update_all<Algorithm, T>(values, param, grad, state[0], state[1], state[2], arrays.size,
                             prefetch);
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

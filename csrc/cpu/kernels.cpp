// The loops over one tile, compiled once per instruction set (RECAP_INSTRUCTION_SET).
#include "kernels.h"

#include "loops.h"
#include "row_kernels.h"

namespace recap::cpu {
namespace {

// Calls go_through(update), where update(first element, elements) updates some of the arrays.
template <typename Algorithm, typename T, typename GoThrough>
RECAP_INLINE void with_update(const Values& values, const Arrays& arrays,
                              const GoThrough& go_through) {
  ArraysOf<T> all = {static_cast<T*>(arrays.param), static_cast<const T*>(arrays.grad), {}};
  for (int k = 0; k < Algorithm::kStates; ++k) all.state[k] = static_cast<T*>(arrays.state[k]);
  with_values<Algorithm, T>(values, [&](const auto& h) __attribute__((always_inline)) {
    go_through([&](int64_t begin, int64_t count) __attribute__((always_inline)) {
      update_range<Algorithm>(h, all, begin, begin + count);
    });
  });
}

template <typename Algorithm, typename T>
void kernel(const Values& values, const Arrays& arrays, Prefetch& prefetch) {
  with_update<Algorithm, T>(values, arrays, [&](const auto& update) __attribute__((always_inline)) {
    for_blocks<T>(arrays, prefetch,
                  [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
                    update(begin, count);
                    if (values.clears_grads) clear_grad<T>(arrays, begin, count);
                  });
  });
}

template <typename Algorithm, typename T>
void middle_kernel(const Values& values, const Arrays& arrays, Way way) {
  with_update<Algorithm, T>(values, arrays, [&](const auto& update) __attribute__((always_inline)) {
    for_turns<Algorithm, T>(arrays, way,
                            [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
                              update(begin, count);
                              if (values.clears_grads) clear_grad<T>(arrays, begin, count);
                            });
  });
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
constexpr void fill(Kernels& kernels, Dtype dtype) {
  Kernel(&row)[kUpdates] = kernels.of[static_cast<int>(dtype)];
  MiddleKernel(&middle)[kUpdates] = kernels.middle_of[static_cast<int>(dtype)];
#define RECAP_KERNEL(name, ...)                                                             \
  row[static_cast<int>(Update::name)] = kernel<typename UpdateType<Update::name>::type, T>; \
  middle[static_cast<int>(Update::name)] =                                                  \
      middle_kernel<typename UpdateType<Update::name>::type, T>;
  RECAP_ELEMENT_UPDATES(RECAP_KERNEL)
#undef RECAP_KERNEL
}

constexpr Kernels make_kernels(const char* instruction_set) {
  Kernels kernels{};
  kernels.instruction_set = instruction_set;
  fill<float>(kernels, Dtype::float32);
  fill<double>(kernels, Dtype::float64);
  fill<BFloat16>(kernels, Dtype::bfloat16);
  fill<Float16>(kernels, Dtype::float16);
  kernels.sum_of_squares[static_cast<int>(Dtype::float32)] = sum_of_squares<float>;
  kernels.sum_of_squares[static_cast<int>(Dtype::float64)] = sum_of_squares<double>;
  kernels.sum_of_squares[static_cast<int>(Dtype::bfloat16)] = sum_of_squares<BFloat16>;
  kernels.sum_of_squares[static_cast<int>(Dtype::float16)] = sum_of_squares<Float16>;
  kernels.rows = &RECAP_TABLE(row_kernels);
  kernels.mixed_of = RECAP_TABLE(mixed_kernels);
#if defined(__AVX512F__)
  kernels.narrow = &kernels_avx2;
#endif
  return kernels;
}

}  // namespace

#define RECAP_QUOTE(set) #set
#define RECAP_NAME(set) RECAP_QUOTE(set)

extern const Kernels RECAP_TABLE(kernels);
const Kernels RECAP_TABLE(kernels) = make_kernels(RECAP_NAME(RECAP_INSTRUCTION_SET));

}  // namespace recap::cpu

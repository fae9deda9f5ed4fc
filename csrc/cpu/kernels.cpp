// The loops over one tile. This file is compiled once per instruction set (RECAP_INSTRUCTION_SET)
// and leaves vectorization to the compiler: the loops are flat, without aliasing and without
// branches.
#include "kernels.h"

#include "../algorithms/storage.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace recap::cpu {
namespace {

template <typename Algorithm, typename T, typename Values>
RECAP_INLINE void update_each(const Values& h, T* __restrict param, const T* __restrict grad,
                              T* __restrict state0, T* __restrict state1, T* __restrict state2,
                              int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    T state[kMaxStates] = {};
    if constexpr (Algorithm::kStates > 0) state[0] = state0[i];
    if constexpr (Algorithm::kStates > 1) state[1] = state1[i];
    if constexpr (Algorithm::kStates > 2) state[2] = state2[i];
    Algorithm::update(h, grad[i], param[i], state);
    if constexpr (Algorithm::kStates > 0) state0[i] = state[0];
    if constexpr (Algorithm::kStates > 1) state1[i] = state[1];
    if constexpr (Algorithm::kStates > 2) state2[i] = state[2];
  }
}

// Whether Adam's averages keep more than half of themselves, as with all usual betas.
template <typename T>
RECAP_INLINE bool slow(const AdamValues<T>& h) {
  return h.average > 0 && h.square < T(0.5);
}
template <typename Values>
RECAP_INLINE constexpr bool slow(const Values&) {
  return false;
}

// Adam's loop is compiled twice: where it knows that the averages are slow, the compiler drops what
// the update selects by that, which is much of what is not waiting for a root or a quotient.
template <typename Algorithm, typename T>
void update_all(const UpdateValues<T>& values, T* __restrict param, const T* __restrict grad,
                T* __restrict state0, T* __restrict state1, T* __restrict state2, int64_t size) {
  const auto h = values.template of<Algorithm>();
  if (slow(h)) {
    update_each<Algorithm>(h, param, grad, state0, state1, state2, size);
  } else {
    update_each<Algorithm>(h, param, grad, state0, state1, state2, size);
  }
}

template <typename Storage>
void load_all(const Storage* __restrict from, float* __restrict to, int64_t size) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(Storage) == sizeof(Float16) && !__is_same(Storage, BFloat16)) {
    for (; i + 8 <= size; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < size; ++i) to[i] = load(from[i]);
}

template <typename Storage>
void store_all(const float* __restrict from, Storage* __restrict to, int64_t size) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(Storage) == sizeof(Float16) && !__is_same(Storage, BFloat16)) {
    for (; i + 8 <= size; i += 8) {
      const __m256 value = _mm256_loadu_ps(from + i);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < size; ++i) store(from[i], to[i]);
}

template <typename Algorithm, typename T>
void kernel(const Values& values, const Arrays& arrays) {
  using C = typename Compute<T>::type;
  T* param = static_cast<T*>(arrays.param);
  const T* grad = static_cast<const T*>(arrays.grad);
  T* state[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) state[k] = static_cast<T*>(arrays.state[k]);

  if constexpr (sizeof(T) == sizeof(C)) {
    update_all<Algorithm, C>(values.in<C>(), param, grad, state[0], state[1], state[2],
                             arrays.size);
  } else {
    // 16-bit storage is widened a block at a time, small enough to stay in the first-level cache.
    constexpr int64_t kBlock = 512;
    alignas(64) C wide_param[kBlock], wide_grad[kBlock], wide_state[kMaxStates][kBlock];
    for (int64_t begin = 0; begin < arrays.size; begin += kBlock) {
      const int64_t size = arrays.size - begin < kBlock ? arrays.size - begin : kBlock;
      load_all(param + begin, wide_param, size);
      load_all(grad + begin, wide_grad, size);
      for (int k = 0; k < Algorithm::kStates; ++k) load_all(state[k] + begin, wide_state[k], size);
      update_all<Algorithm, C>(values.in<C>(), wide_param, wide_grad, wide_state[0], wide_state[1],
                               wide_state[2], size);
      store_all(wide_param, param + begin, size);
      for (int k = 0; k < Algorithm::kStates; ++k) store_all(wide_state[k], state[k] + begin, size);
    }
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
  using C = typename Compute<T>::type;
  const T* const all = static_cast<const T*>(elements);
  Eight<double>::type lanes[4] = {};
  if constexpr (sizeof(T) == sizeof(C)) {
    add_squares(all, size, lanes);
  } else {
    constexpr int64_t kBlock = 512;
    alignas(64) C wide[kBlock];
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const int64_t count = size - begin < kBlock ? size - begin : kBlock;
      load_all(all + begin, wide, count);
      add_squares(wide, count, lanes);
    }
  }
  const Eight<double>::type eight = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  double sum = 0.0;
  for (int lane = 0; lane < 8; ++lane) sum += eight[lane];
  return sum;
}

template <typename T>
constexpr void fill(Kernel (&row)[kUpdates]) {
#define RECAP_KERNEL(name) \
  row[static_cast<int>(Update::name)] = kernel<typename UpdateType<Update::name>::type, T>
  RECAP_KERNEL(adam);
  RECAP_KERNEL(adam_l2);
  RECAP_KERNEL(adam_amsgrad);
  RECAP_KERNEL(adam_amsgrad_l2);
  RECAP_KERNEL(adagrad);
  RECAP_KERNEL(adagrad_l2);
  RECAP_KERNEL(sgd);
  RECAP_KERNEL(sgd_l2);
  RECAP_KERNEL(sgd_momentum);
  RECAP_KERNEL(sgd_momentum_l2);
  RECAP_KERNEL(sgd_nesterov);
  RECAP_KERNEL(sgd_nesterov_l2);
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
  return kernels;
}

}  // namespace

#define RECAP_JOIN(a, b) a##b
#define RECAP_TABLE(set) RECAP_JOIN(kernels_, set)
#define RECAP_QUOTE(set) #set
#define RECAP_NAME(set) RECAP_QUOTE(set)

extern const Kernels RECAP_TABLE(RECAP_INSTRUCTION_SET);
const Kernels RECAP_TABLE(RECAP_INSTRUCTION_SET) = make_kernels(RECAP_NAME(RECAP_INSTRUCTION_SET));

}  // namespace recap::cpu

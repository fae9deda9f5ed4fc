// The loops over one tile. This file is compiled once per instruction set (RECAP_INSTRUCTION_SET)
// and leaves vectorization to the compiler: the inner loops are flat, without aliasing and without
// branches.
#include "kernels.h"

#include "../algorithms/storage.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace recap::cpu {
namespace {

template <typename Algorithm, typename T, typename Values>
RECAP_INLINE void update_range(const Values& h, T* __restrict param, const T* __restrict grad,
                               T* __restrict state0, T* __restrict state1, T* __restrict state2,
                               int64_t begin, int64_t end) {
  using C = typename Compute<T>::type;
  for (int64_t i = begin; i < end; ++i) {
    C p = load(param[i]);
    C state[kMaxStates] = {};
    if constexpr (Algorithm::kStates > 0) state[0] = load(state0[i]);
    if constexpr (Algorithm::kStates > 1) state[1] = load(state1[i]);
    if constexpr (Algorithm::kStates > 2) state[2] = load(state2[i]);
    Algorithm::update(h, load(grad[i]), p, state);
    store(p, param[i]);
    if constexpr (Algorithm::kStates > 0) store(state[0], state0[i]);
    if constexpr (Algorithm::kStates > 1) store(state[1], state1[i]);
    if constexpr (Algorithm::kStates > 2) store(state[2], state2[i]);
  }
}

// A block at a time, with a request for later memory before each.
template <typename Algorithm, typename T, typename Values, typename Requests>
RECAP_INLINE void update_blocks(const Values& h, T* __restrict param, const T* __restrict grad,
                                T* __restrict state0, T* __restrict state1, T* __restrict state2,
                                int64_t size, Requests& ahead) {
  constexpr int64_t kBlock = kBlockBytes / sizeof(T);
  int64_t begin = 0;
  for (; begin + kBlock <= size; begin += kBlock) {
    ahead.next_block();
    update_range<Algorithm>(h, param, grad, state0, state1, state2, begin, begin + kBlock);
  }
  if (begin == size) return;
  ahead.next_block();
  update_range<Algorithm>(h, param, grad, state0, state1, state2, begin, size);
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
template <typename Algorithm, typename T, typename Requests>
void update_all(const Values& values, T* __restrict param, const T* __restrict grad,
                T* __restrict state0, T* __restrict state1, T* __restrict state2, int64_t size,
                Requests& ahead) {
  const auto h = values.in<typename Compute<T>::type>().template of<Algorithm>();
  if (slow(h)) {
    update_blocks<Algorithm>(h, param, grad, state0, state1, state2, size, ahead);
  } else {
    update_blocks<Algorithm>(h, param, grad, state0, state1, state2, size, ahead);
  }
}

void load_all(const BFloat16* __restrict from, float* __restrict to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = load(from[i]);
}

// Half precision is converted by instructions of their own, which the compiler does not find.
void load_all(const Float16* __restrict from, float* __restrict to, int64_t size) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= size; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(0xffff, half));
  }
#elif defined(__F16C__)
  for (; i + 8 <= size; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < size; ++i) to[i] = load(from[i]);
}

void store_all(const float* __restrict from, Float16* __restrict to, int64_t size) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= size; i += 16) {
    const __m512 value = _mm512_loadu_ps(from + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  for (; i + 8 <= size; i += 8) {
    const __m256 value = _mm256_loadu_ps(from + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < size; ++i) store(from[i], to[i]);
}

struct NoRequests {
  RECAP_INLINE void next_block() {}
};

// A block at a time, small enough to stay in the first-level cache.
template <typename Algorithm>
void update_wide(const Values& values, Float16* param, const Float16* grad, Float16* const* state,
                 int64_t size, Ahead& ahead) {
  constexpr int64_t kBlock = kBlockBytes / sizeof(Float16);
  alignas(64) float wide_param[kBlock], wide_grad[kBlock], wide_state[kMaxStates][kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = size - begin < kBlock ? size - begin : kBlock;
    ahead.next_block();
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
void kernel(const Values& values, const Arrays& arrays, Ahead& ahead) {
  T* param = static_cast<T*>(arrays.param);
  const T* grad = static_cast<const T*>(arrays.grad);
  T* state[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) state[k] = static_cast<T*>(arrays.state[k]);
  if constexpr (__is_same(T, Float16)) {
    update_wide<Algorithm>(values, param, grad, state, arrays.size, ahead);
  } else {
    update_all<Algorithm, T>(values, param, grad, state[0], state[1], state[2], arrays.size, ahead);
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

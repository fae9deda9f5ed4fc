// The loops over one row, compiled once per instruction set (RECAP_INSTRUCTION_SET).
#include "row_kernels.h"

#include <cstring>

#include "loops.h"

namespace recap::cpu {
namespace {

// Elements that are converted at a time; a multiple of the lanes in which squares are summed.
constexpr int64_t kBlock = 512;

// The elements themselves, or where their type is not that of the update, `block` with them.
template <typename C, typename T>
RECAP_INLINE const C* widened(const T* from, C* block, int64_t size) {
  if constexpr (__is_same(T, C)) {
    return from;
  } else {
    load_all(from, block, size);
    return block;
  }
}

template <typename Algorithm, typename C, typename Values>
RECAP_INLINE void add_squares(const Values& h, const C* __restrict param, const C* __restrict grad,
                              C* __restrict lanes, int64_t size) {
  constexpr int64_t kLanes = Algorithm::kLanes;
  int64_t begin = 0;
  for (; begin + kLanes <= size; begin += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const C g = Algorithm::gradient(h, grad[begin + i], param[begin + i]);
      lanes[i] += g * g;
    }
  }
  for (int64_t i = begin; i < size; ++i) {
    const C g = Algorithm::gradient(h, grad[i], param[i]);
    lanes[i - begin] += g * g;
  }
}

template <bool kL2, typename T, typename G>
void rowwise_adagrad(const Values& values, const Arrays& row) {
  using Algorithm = RowwiseAdagrad<kL2>;
  using C = typename Compute<T>::type;
  const auto h = values.in<C>().template of<Algorithm>();
  T* const param = static_cast<T*>(row.param);
  const G* const grad = static_cast<const G*>(row.grad);
  alignas(64) C wide_param[__is_same(T, C) ? 1 : kBlock], wide_grad[__is_same(G, C) ? 1 : kBlock];
  alignas(64) C lanes[Algorithm::kLanes] = {};
  for (int64_t begin = 0; begin < row.size; begin += kBlock) {
    const int64_t count = row.size - begin < kBlock ? row.size - begin : kBlock;
    const C* const g = widened(grad + begin, wide_grad, count);
    const C* const p = kL2 ? widened(param + begin, wide_param, count) : g;
    add_squares<Algorithm>(h, p, g, lanes, count);
  }
  C& sum = *static_cast<C*>(row.state[0]);
  const C multiplier = Algorithm::take(h, Algorithm::total(lanes), static_cast<C>(row.size), sum);
  for (int64_t begin = 0; begin < row.size; begin += kBlock) {
    const int64_t count = row.size - begin < kBlock ? row.size - begin : kBlock;
    const C* __restrict const g = widened(grad + begin, wide_grad, count);
    if constexpr (__is_same(T, C)) {
      C* __restrict const p = param + begin;
      for (int64_t i = 0; i < count; ++i) p[i] = Algorithm::update(h, multiplier, g[i], p[i]);
    } else {
      C* __restrict const p = wide_param;
      load_all(param + begin, p, count);
      for (int64_t i = 0; i < count; ++i) p[i] = Algorithm::update(h, multiplier, g[i], p[i]);
      store_all(p, param + begin, count);
    }
  }
}

// As `kernel` of kernels.cpp, but that the gradient is float already.
template <typename Algorithm, typename T>
void update_by_sum(const Values& values, const Arrays& arrays, Prefetch&) {
  constexpr int64_t kWide = 128;
  T* const param = static_cast<T*>(arrays.param);
  const float* const grad = static_cast<const float*>(arrays.grad);
  alignas(64) float wide_param[kWide], wide_state[kMaxStates][kWide];
  for (int64_t begin = 0; begin < arrays.size; begin += kWide) {
    const int64_t count = arrays.size - begin < kWide ? arrays.size - begin : kWide;
    load_all(param + begin, wide_param, count);
    for (int k = 0; k < Algorithm::kStates; ++k) {
      load_all(static_cast<const T*>(arrays.state[k]) + begin, wide_state[k], count);
    }
    const ArraysOf<float> wide = {
        wide_param, grad + begin, {wide_state[0], wide_state[1], wide_state[2]}};
    update_in_cache<Algorithm>(values, wide, count);
    store_all(wide_param, param + begin, count);
    for (int k = 0; k < Algorithm::kStates; ++k) {
      store_all(wide_state[k], static_cast<T*>(arrays.state[k]) + begin, count);
    }
  }
}

template <typename Bits>
bool is_zero(const void* row, int64_t size) {
  constexpr int64_t kChunk = 64 / sizeof(Bits);
  const auto* const from = static_cast<const char*>(row);
  const auto any_but_sign = [](const Bits* bits, int64_t count) {
    Bits any = 0;
    for (int64_t i = 0; i < count; ++i) any |= bits[i];
    return static_cast<Bits>(any << 1) != 0;
  };
  Bits bits[kChunk];
  int64_t begin = 0;
  for (; begin + kChunk <= size; begin += kChunk) {
    memcpy(bits, from + begin * sizeof(Bits), sizeof bits);
    if (any_but_sign(bits, kChunk)) return false;
  }
  memcpy(bits, from + begin * sizeof(Bits), (size - begin) * sizeof(Bits));
  return !any_but_sign(bits, size - begin);
}

template <typename T>
void add_row(const void* row, bool first, void* sum, int64_t size) {
  using C = typename Compute<T>::type;
  const T* const from = static_cast<const T*>(row);
  alignas(64) C block[kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = size - begin < kBlock ? size - begin : kBlock;
    C* __restrict const to = static_cast<C*>(sum) + begin;
    const C* __restrict const wide = widened(from + begin, block, count);
    if (first) {
      memcpy(to, wide, count * sizeof(C));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] += wide[i];
    }
  }
}

template <typename T>
constexpr void fill(RowKernels& kernels, Dtype dtype) {
  using C = typename Compute<T>::type;
  const int at = static_cast<int>(dtype);
  kernels.rowwise_adagrad[at] = rowwise_adagrad<false, T, T>;
  kernels.rowwise_adagrad_l2[at] = rowwise_adagrad<true, T, T>;
  kernels.rowwise_adagrad_of_sum[at] = rowwise_adagrad<false, T, C>;
  kernels.rowwise_adagrad_l2_of_sum[at] = rowwise_adagrad<true, T, C>;
  kernels.add[at] = add_row<T>;
}

// A sum of rows of float or double is a gradient like any other, and needs no kernel of its own.
template <typename T>
constexpr void fill_of_sum(Kernel (&row)[kUpdates]) {
#define RECAP_KERNEL(name, ...) \
  row[static_cast<int>(Update::name)] = update_by_sum<typename UpdateType<Update::name>::type, T>;
  RECAP_ELEMENT_UPDATES(RECAP_KERNEL)
#undef RECAP_KERNEL
}

constexpr RowKernels make_row_kernels() {
  RowKernels kernels{};
  fill<float>(kernels, Dtype::float32);
  fill<double>(kernels, Dtype::float64);
  fill<BFloat16>(kernels, Dtype::bfloat16);
  fill<Float16>(kernels, Dtype::float16);
  fill_of_sum<BFloat16>(kernels.of_sum[static_cast<int>(Dtype::bfloat16)]);
  fill_of_sum<Float16>(kernels.of_sum[static_cast<int>(Dtype::float16)]);
  kernels.is_zero[static_cast<int>(Dtype::float32)] = is_zero<uint32_t>;
  kernels.is_zero[static_cast<int>(Dtype::float64)] = is_zero<uint64_t>;
  kernels.is_zero[static_cast<int>(Dtype::bfloat16)] = is_zero<uint16_t>;
  kernels.is_zero[static_cast<int>(Dtype::float16)] = is_zero<uint16_t>;
  return kernels;
}

}  // namespace

extern const RowKernels RECAP_TABLE(row_kernels);
const RowKernels RECAP_TABLE(row_kernels) = make_row_kernels();

}  // namespace recap::cpu

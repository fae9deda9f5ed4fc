// The ceiling: a trivial loop that reads and writes what one optimizer step must, and computes next
// to nothing. Compiled and loaded by ceiling.py.
//
// Each thread takes one contiguous run of all elements. OpenMP is switched on but not linked: the
// calls resolve to the runtime that torch has loaded, so that two thread pools never compete.
#include <algorithm>
#include <cstdint>

namespace {

// Below this many elements for each thread, waking it costs more than it saves.
constexpr int64_t kMinElementsPerThread = 32 * 1024;

struct Tensors {
  float* const* params;
  const float* const* grads;
  float* const* states[2];
  const int64_t* sizes;
  int64_t count;
};

template <int kStates>
void add(float* __restrict param, const float* __restrict grad, float* __restrict state0,
         float* __restrict state1, int64_t size, float rate) {
  for (int64_t i = 0; i < size; ++i) {
    const float change = rate * grad[i];
    if constexpr (kStates > 0) state0[i] += change;
    if constexpr (kStates > 1) state1[i] += change;
    param[i] += change;
  }
}

// The elements [begin, end) of all tensors laid end to end.
template <int kStates>
void run(const Tensors& t, int64_t begin, int64_t end, float rate) {
  int64_t first = 0;
  for (int64_t k = 0; k < t.count && first < end; first += t.sizes[k++]) {
    const int64_t from = std::max(begin, first) - first;
    const int64_t to = std::min(end - first, t.sizes[k]);
    if (from >= to) continue;
    add<kStates>(t.params[k] + from, t.grads[k] + from,
                 kStates > 0 ? t.states[0][k] + from : nullptr,
                 kStates > 1 ? t.states[1][k] + from : nullptr, to - from, rate);
  }
}

}  // namespace

extern "C" void recap_ceiling(float* const* params, const float* const* grads,
                              float* const* states0, float* const* states1, const int64_t* sizes,
                              int64_t count, int states, int max_threads, float rate) {
  const Tensors tensors{params, grads, {states0, states1}, sizes, count};
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += sizes[k];
  const auto run_part = states == 2 ? run<2> : states == 1 ? run<1> : run<0>;
  const int64_t threads =
      std::clamp<int64_t>(total / kMinElementsPerThread, 1, std::max(max_threads, 1));
  if (threads == 1) {
    run_part(tensors, 0, total, rate);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; ++part) {
    run_part(tensors, total * part / threads, total * (part + 1) / threads, rate);
  }
}

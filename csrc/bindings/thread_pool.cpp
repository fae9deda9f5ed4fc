// Compiled with OpenMP switched on but not linked to a runtime of its own: the calls resolve to the
// runtime that libtorch brought, whose threads are then the ones that run.
#include "thread_pool.h"

#include <ATen/Parallel.h>

#ifdef RECAP_SEEN_BY_TSAN
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace recap {
namespace {

// ThreadSanitizer does not see how that runtime starts threads and waits for them, and is told:
// what comes before `hand_over` on one thread happens before what comes after `take_over` on
// another.
#ifdef RECAP_SEEN_BY_TSAN
void hand_over(void* context) { __tsan_release(context); }
void take_over(void* context) { __tsan_acquire(context); }
#else
void hand_over(void*) {}
void take_over(void*) {}
#endif

}  // namespace

cpu::ThreadPool torch_thread_pool() {
  cpu::ThreadPool pool;
  pool.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  pool.run = [](int count, void (*task)(int, void*), void* context) {
    hand_over(context);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      take_over(context);
      for (int64_t i = begin; i < end; ++i) task(static_cast<int>(i), context);
      hand_over(context);
    });
    take_over(context);
  };
  return pool;
}

}  // namespace recap

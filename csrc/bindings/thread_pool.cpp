// Compiled with OpenMP switched on but not linked to a runtime of its own: the calls resolve to the
// runtime that libtorch brought, whose threads are then the ones that run.
#include "thread_pool.h"

#include <ATen/Parallel.h>

namespace recap {

cpu::ThreadPool torch_thread_pool() {
  cpu::ThreadPool pool;
  pool.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  pool.run = [](int count, void (*task)(int, void*), void* context) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(static_cast<int>(i), context);
    });
  };
  return pool;
}

}  // namespace recap

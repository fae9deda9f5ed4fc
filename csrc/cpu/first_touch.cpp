#include "first_touch.h"

#include <algorithm>

namespace recap::cpu {
namespace {

constexpr int64_t kPage = 4096;

}  // namespace

void touch_pages(void* memory, int64_t bytes, Share share, const ThreadPool& pool) {
  struct Context {
    volatile char* memory;
    int64_t bytes;
    Share share;
    int threads;

    // The first byte of what thread number `index` steps.
    int64_t begin(int index) const {
      const double at = static_cast<double>(index) / threads;
      const double part = (at - share.begin) / (share.end - share.begin);
      return static_cast<int64_t>(std::clamp(part, 0.0, 1.0) * static_cast<double>(bytes));
    }
  } context{static_cast<char*>(memory), bytes, share, pool.threads};
  const auto touch = [](int index, void* opaque) {
    const Context& c = *static_cast<Context*>(opaque);
    const int64_t end = index + 1 == c.threads ? c.bytes : c.begin(index + 1);
    for (int64_t at = c.begin(index); at < end; at += kPage) c.memory[at] = 0;
  };
  if (pool.threads > 1) {
    pool.run(pool.threads, touch, &context);
  } else {
    touch(0, &context);
  }
}

}  // namespace recap::cpu

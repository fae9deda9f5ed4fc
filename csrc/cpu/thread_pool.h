// Threads that a caller lends to the CPU engine.
#pragma once

namespace recap::cpu {

// A pool of `threads` threads: `run` calls task(i, context) for every i in [0, count), in any order
// and on any thread, and returns when all are done.
struct ThreadPool {
  int threads;
  void (*run)(int count, void (*task)(int index, void* context), void* context);
};

}  // namespace recap::cpu

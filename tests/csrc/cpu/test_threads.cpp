// The CPU engine on several threads: the bits do not depend on them, and the work is shared fairly.
// Also what ThreadSanitizer is to look at.
#include <sys/mman.h>

#include <algorithm>
#include <thread>

#include "check.h"
#include "compare.h"
#include "cpu/engine.h"
#include "cpu/first_touch.h"
#include "problem.h"
#include "scalar_engine.h"

namespace {

using recap::cpu::ThreadPool;

constexpr int64_t kTile = recap::cpu::kTileSize;
constexpr int64_t kPage = 4096;

void run_on_threads(int count, void (*task)(int, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(task, i, context);
  for (std::thread& thread : threads) thread.join();
}

void run_backwards(int count, void (*task)(int, void*), void* context) {
  for (int i = count - 1; i >= 0; --i) task(i, context);
}

TEST(any_number_of_threads_gives_the_same_bits) {
  const std::vector<SlotShape> shapes = mixed_shapes();
  Problem expected(shapes, Numbers::ordinary);
  scalar::run(expected.plan, expected.step);
  const std::vector<ThreadPool> pools = {{1, run_on_threads},  {2, run_on_threads},
                                         {3, run_on_threads},  {7, run_on_threads},
                                         {64, run_on_threads}, {7, run_backwards}};
  for (const ThreadPool& pool : pools) {
    Problem found(shapes, Numbers::ordinary);
    recap::cpu::run(found.plan, found.step, pool);
    check_same(found, expected, pool.threads, " threads");
  }
}

// Counting down by ones is exact, so a missing or a second update of an element shows.
TEST(every_element_is_updated_once) {
  std::mt19937 random(6);
  for (int run = 0; run < 10; ++run) {
    std::vector<SlotShape> shapes;
    for (int i = 0; i < 12; ++i) {
      shapes.push_back(
          {Update::sgd, Dtype::float32, static_cast<int64_t>(random() % (10 * kTile))});
    }
    Problem problem(shapes, Numbers::ordinary);
    recap::Hyper hyper;
    hyper.algorithm = recap::Algorithm::sgd;
    hyper.lr = 1;
    hyper.sgd = {0, 0, 0, false};
    problem.step.values.assign(shapes.size(), recap::make_values(hyper, 1, false, 1));
    for (size_t slot = 0; slot < shapes.size(); ++slot) {
      float* param = reinterpret_cast<float*>(problem.array(slot, 0)->data());
      float* grad = reinterpret_cast<float*>(problem.array(slot, 1)->data());
      for (int64_t i = 0; i < shapes[slot].size; ++i) param[i] = static_cast<float>(i);
      std::fill_n(grad, shapes[slot].size, 1.0f);
    }
    recap::cpu::run(problem.plan, problem.step, {1 + run % 9, run_on_threads});
    for (size_t slot = 0; slot < shapes.size(); ++slot) {
      const float* param = reinterpret_cast<const float*>(problem.array(slot, 0)->data());
      for (int64_t i = 0; i < shapes[slot].size; ++i) {
        CHECK_EQ(param[i], static_cast<float>(i - 1), "slot ", slot, " element ", i);
      }
    }
  }
}

int index_to_run = 0;
int tasks_offered = 0;
void run_one_index(int count, void (*task)(int, void*), void* context) {
  tasks_offered = count;
  task(index_to_run, context);
}

TEST(the_threads_get_equal_shares) {
  constexpr int kThreads = 5;
  std::vector<SlotShape> shapes = {{Update::sgd, Dtype::float64, 20 * kTile},
                                   {Update::sgd, Dtype::float32, 30 * kTile, false},
                                   {Update::sgd, Dtype::bfloat16, 90 * kTile + 5}};
  for (int i = 0; i < 200; ++i) shapes.push_back({Update::sgd, Dtype::float32, 700});
  int64_t total = 0;
  for (const SlotShape& shape : shapes) {
    if (shape.has_grad) total += shape.size * recap::dtype_size(shape.dtype);
  }
  Problem before(shapes, Numbers::ordinary);
  for (index_to_run = 0; index_to_run < kThreads; ++index_to_run) {
    Problem after(shapes, Numbers::ordinary);
    recap::cpu::run(after.plan, after.step, {kThreads, run_one_index});
    CHECK_EQ(tasks_offered, kThreads);
    int64_t bytes = 0;
    for (const recap::Tile& tile : after.plan.tiles) {
      const int64_t element = recap::dtype_size(shapes[tile.slot].dtype);
      const bool updated = memcmp(after.array(tile.slot, 0)->data() + tile.begin * element,
                                  before.array(tile.slot, 0)->data() + tile.begin * element,
                                  tile.size * element) != 0;
      if (updated) bytes += tile.size * element;
    }
    const int64_t largest_tile = kTile * 8;
    CHECK(std::abs(bytes - total / kThreads) <= largest_tile, "thread ", index_to_run, " got ",
          bytes, " bytes of ", total);
  }
}

// Of fresh memory, which pages are there.
std::vector<bool> resident(void* memory, size_t bytes) {
  std::vector<unsigned char> found(bytes / kPage);
  CHECK(mincore(memory, bytes, found.data()) == 0);
  std::vector<bool> out;
  for (const unsigned char each : found) out.push_back(each & 1);
  return out;
}

// On a machine with several memory nodes, a page lies at that of the thread that first writes to
// it.
TEST(a_thread_touches_what_it_will_step) {
  constexpr int kThreads = 3;
  const std::vector<SlotShape> shapes = {{Update::sgd_momentum, Dtype::float32, 50 * kTile},
                                         {Update::sgd_momentum, Dtype::float32, 30 * kTile},
                                         {Update::sgd_momentum, Dtype::float32, 70 * kTile}};
  for (index_to_run = 0; index_to_run < kThreads; ++index_to_run) {
    Problem problem(shapes, Numbers::ordinary);
    recap::cpu::run(problem.plan, problem.step, {kThreads, run_one_index});
    Problem before(shapes, Numbers::ordinary);
    double begin = 0;
    for (size_t slot = 0; slot < shapes.size(); ++slot) {
      const double end = begin + static_cast<double>(shapes[slot].size) / (150 * kTile);
      const size_t bytes = shapes[slot].size * sizeof(float);
      void* const memory =
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      CHECK(memory != MAP_FAILED);
      madvise(memory, bytes, MADV_NOHUGEPAGE);
      recap::cpu::touch_pages(memory, bytes, {begin, end}, {kThreads, run_one_index});
      const std::vector<bool> pages = resident(memory, bytes);
      int wrong = 0;  // at most a tile, where one thread's run ends
      for (size_t page = 0; page < pages.size(); ++page) {
        const bool stepped = memcmp(problem.array(slot, 0)->data() + page * kPage,
                                    before.array(slot, 0)->data() + page * kPage, kPage) != 0;
        wrong += pages[page] != stepped;
      }
      CHECK(wrong <= 2 * kTile * 4 / kPage, wrong, " pages of slot ", slot);
      const char* const zeros = static_cast<const char*>(memory);
      CHECK(std::all_of(zeros, zeros + bytes, [](char byte) { return byte == 0; }));
      munmap(memory, bytes);
      begin = end;
    }
  }
}

}  // namespace

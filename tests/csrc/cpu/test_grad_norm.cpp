// The squared norm of gradients: against long double, and the same bits however it is computed.
#include <cmath>
#include <limits>
#include <thread>

#include "check.h"
#include "cpu/engine.h"
#include "cpu/grad_norm.h"
#include "problem.h"

namespace {

using recap::cpu::GradNorm;
using recap::cpu::ThreadPool;

void run_on_threads(int count, void (*task)(int, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(task, i, context);
  for (std::thread& thread : threads) thread.join();
}

std::vector<uint32_t> deal_out(size_t slots, uint32_t parts) {
  std::vector<uint32_t> part_of_slot;
  for (size_t i = 0; i < slots; ++i) part_of_slot.push_back(i % parts);
  return part_of_slot;
}

double value_of(const void* gradient, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float32: return static_cast<const float*>(gradient)[i];
    case Dtype::float64: return static_cast<const double*>(gradient)[i];
    case Dtype::bfloat16: return recap::load(static_cast<const recap::BFloat16*>(gradient)[i]);
    case Dtype::float16: return recap::load(static_cast<const recap::Float16*>(gradient)[i]);
  }
  return 0;
}

std::vector<double> expected_sums(const Problem& problem, uint32_t parts) {
  std::vector<long double> sums(parts, 0.0L);
  for (size_t slot = 0; slot < problem.plan.slots.size(); ++slot) {
    const void* const gradient = problem.step.grads[slot];
    if (!gradient) continue;
    for (int64_t i = 0; i < problem.plan.slots[slot].size; ++i) {
      const long double x = value_of(gradient, problem.plan.slots[slot].dtype, i);
      sums[slot % parts] += x * x;
    }
  }
  return std::vector<double>(sums.begin(), sums.end());
}

TEST(sums_agree_with_long_double_and_do_not_depend_on_threads_or_instruction_set) {
  Problem problem(mixed_shapes(), Numbers::ordinary);
  for (const uint32_t parts : {1u, 3u}) {
    const auto part_of_slot = deal_out(problem.plan.slots.size(), parts);
    const std::vector<double> expected = expected_sums(problem, parts);
    std::vector<double> first;
    for (const std::string& name : recap::cpu::instruction_sets()) {
      recap::cpu::use_instruction_set(name);
      for (const int threads : {1, 2, 7}) {
        GradNorm norm;
        for (int again = 0; again < 2; ++again) {
          const std::vector<double>& sums = norm.sums_of_squares(
              problem.plan, problem.step, part_of_slot, parts, {threads, run_on_threads});
          CHECK_EQ(sums.size(), parts, "parts");
          if (first.size() != parts) first = sums;
          for (uint32_t part = 0; part < parts; ++part) {
            CHECK_EQ(sums[part], first[part], name, " with ", threads, " threads");
            // A lane of a tile adds some 256 squares, each time rounding once.
            CHECK(std::fabs(sums[part] - expected[part]) <= 3e-14 * expected[part], "part ", part);
          }
        }
      }
    }
    recap::cpu::use_instruction_set("");
  }
}

TEST(the_order_of_the_slots_does_not_show) {
  const std::vector<SlotShape> shapes = mixed_shapes();
  Problem problem(shapes, Numbers::ordinary);
  const auto part_of_slot = deal_out(shapes.size(), 1);
  GradNorm norm;
  const auto sum = [&] {
    return norm.sums_of_squares(problem.plan, problem.step, part_of_slot, 1,
                                {1, run_on_threads})[0];
  };
  const double expected = sum();
  std::reverse(problem.plan.slots.begin(), problem.plan.slots.end());
  std::reverse(problem.step.grads.begin(), problem.step.grads.end());
  problem.plan.tiles = recap::cut_tiles(problem.plan.slots, recap::cpu::kTileSize);
  CHECK_EQ(sum(), expected, "backwards");
}

TEST(every_size_and_alignment_is_read_as_it_is) {
  for (int64_t size = 0; size < 140; ++size) {
    for (int dtype = 0; dtype < recap::kDtypes; ++dtype) {
      Problem problem({{Update::sgd, static_cast<Dtype>(dtype), size, true, int(size % 4)}},
                      Numbers::ordinary);
      GradNorm norm;
      const double found =
          norm.sums_of_squares(problem.plan, problem.step, {0}, 1, {1, run_on_threads})[0];
      const double expected = expected_sums(problem, 1)[0];
      CHECK(std::fabs(found - expected) <= 1e-14 * expected, size, " elements of dtype ", dtype);
      CHECK(problem.guards_intact(), size);
    }
  }
}

TEST(what_is_not_finite_shows) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const double bad : {inf, -inf, std::numeric_limits<double>::quiet_NaN()}) {
    for (const int64_t at : {0, 8191, 8192, 19999}) {
      Problem problem({{Update::adam, Dtype::float32, 100}, {Update::adam, Dtype::float32, 20000}},
                      Numbers::ordinary);
      problem.set(1, 1, at, bad);
      GradNorm norm;
      const auto sums =
          norm.sums_of_squares(problem.plan, problem.step, {0, 1}, 2, {2, run_on_threads});
      CHECK(std::isfinite(sums[0]), "the other part");
      CHECK(!std::isfinite(sums[1]), "element ", at);
      CHECK_EQ(std::isnan(sums[1]), std::isnan(bad), "element ", at);
    }
  }
}

TEST(large_and_small_numbers_are_kept) {
  Problem problem({{Update::sgd, Dtype::float32, 2}, {Update::sgd, Dtype::float32, 0}},
                  Numbers::ordinary);
  problem.set(0, 1, 0, 3e38);
  problem.set(0, 1, 1, 1e-38);
  GradNorm norm;
  const auto sums =
      norm.sums_of_squares(problem.plan, problem.step, {0, 1}, 2, {1, run_on_threads});
  CHECK_EQ(sums[0], double(3e38f) * double(3e38f), "a square beyond float32");
  CHECK_EQ(sums[1], 0.0, "a part without elements");
}

}  // namespace

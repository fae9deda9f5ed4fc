// The CUDA engine on an emulated machine: the same bits as the CPU engine, each element written
// once and nothing beside it, and no reliance on an order that streams do not give.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <stdexcept>
#include <string>

#include "check.h"
#include "cuda/launch_arguments.h"
#include "twin.h"

using recap::cuda::Engine;
using recap::cuda::kTileSize;

namespace {

constexpr int kThreads = 256;

// Runs one step on both sides and compares everything.
void check_step(Twin& twin) {
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* stream = machine.stream(0);
  twin.watch();
  {
    Engine engine(0, twin.cuda.plan, stream);
    engine.run(twin.cuda.step, stream);
  }
  machine.synchronize();
  twin.run_cpu();
  CHECK_EQ(twin.difference(), "");
  CHECK_EQ(twin.wrong_stores(1), "");
  machine.watched.clear();
  CHECK_EQ(machine.allocated.size(), size_t{0});
}

bool throws_naming(const std::string& part, const std::function<void()>& action) {
  try {
    action();
  } catch (const std::exception& error) {
    CHECK(std::string(error.what()).find(part) != std::string::npos, error.what());
    return true;
  }
  return false;
}

// `count` one-element tensors whose values are `entries` different ones.
std::vector<Tensor> many_small(int count, int entries, Dtype dtype = Dtype::float32) {
  std::vector<Tensor> tensors(count);
  for (int i = 0; i < count; ++i) {
    tensors[i].dtype = dtype;
    tensors[i].step = 1 + i % entries;
  }
  return tensors;
}

// What one parameter of `bytes` bytes has room for: after a header of 32 bytes, 8 per slot, and per
// entry its values, in double too if a slot needs them, and a byte.
int slots_that_fit(int bytes, int entries, Dtype dtype) {
  const int per_entry = sizeof(recap::UpdateValues<float>) + 1 +
                        (dtype == Dtype::float64 ? sizeof(recap::UpdateValues<double>) : 0);
  return (bytes - static_cast<int>(sizeof(recap::cuda::ArgumentsHeader)) - entries * per_entry) / 8;
}

}  // namespace

TEST(every_update_and_dtype_at_every_size_and_alignment) {
  const std::array<int, kTwinArrays> aligned = {}, equally = {1, 1, 1, 1, 1},
                                     gradient_only = {0, 3}, state_only = {0, 0, 0, 0, 2},
                                     differently = {0, 1, 2, 3, 1};
  for (const Dtype dtype : all_dtypes()) {
    const int64_t width = 16 / recap::dtype_size(dtype);
    const int64_t chunk = kThreads * width;
    std::vector<Tensor> tensors;
    for (const Update update : all_updates()) {
      for (const int64_t size : {int64_t{1}, width, width + 1, int64_t{kThreads} + 1, chunk - 1,
                                 chunk, 2 * chunk + 1, 2 * kTileSize + 3}) {
        tensors.push_back({update, dtype, size, true, aligned});
      }
      for (const auto& shift : {equally, gradient_only, state_only, differently}) {
        tensors.push_back({update, dtype, chunk + width + 1, true, shift, 2});
      }
    }
    Twin twin(tensors);
    check_step(twin);
  }
}

TEST(every_update_in_every_format) {
  using recap::ParamRounding;
  constexpr Dtype kStored[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  for (const Dtype dtype : kStored) {
    std::vector<Tensor> tensors;
    for (const Dtype grad : kStored) {
      for (int kind = 0; kind < 4; ++kind) {
        const Dtype state = kStored[kind % 3];
        for (int param = 0; param < 4; ++param) {
          const auto rounding = static_cast<ParamRounding>(param);
          if (rounding == ParamRounding::remainder && dtype != Dtype::bfloat16) continue;
          if (rounding == ParamRounding::master && dtype != Dtype::float16) continue;
          if (rounding == ParamRounding::stochastic && dtype == Dtype::float32) continue;
          for (const Update update : all_updates()) {
            Tensor tensor{update, dtype, 4 * kThreads + 6};
            recap::Format format;
            format.grad = grad;
            format.state = state;
            format.param = rounding;
            format.has_codes = kind == 3;
            format.draws_for_states = state != Dtype::float32 || format.has_codes;
            format.seed = tensors.size();
            tensor.format = format;
            tensors.push_back(tensor);
          }
        }
      }
    }
    Twin twin(tensors);
    check_step(twin);
  }
}

TEST(formats_at_every_size_and_alignment) {
  recap::Format format;
  format.grad = Dtype::float16;
  format.state = Dtype::bfloat16;
  format.draws_for_states = true;
  std::vector<Tensor> tensors;
  for (const auto rounding : {recap::ParamRounding::remainder, recap::ParamRounding::stochastic}) {
    format.param = rounding;
    format.has_codes = rounding == recap::ParamRounding::stochastic;
    format.state = format.has_codes ? Dtype::float32 : Dtype::bfloat16;
    for (const int64_t first : {0, 1, 14, 4099}) {
      format.first_element = first;
      for (const int64_t size : {1, 3, 4, 5, 16, 1023, 1025, 2 * static_cast<int>(kTileSize) + 3}) {
        for (const int shift : {0, 1, 2}) {
          Tensor tensor{Update::adam_amsgrad, Dtype::bfloat16, size};
          tensor.shift = {shift, 0, shift, 0, 1, 3};
          tensor.format = format;
          tensors.push_back(tensor);
        }
      }
    }
  }
  Twin twin(tensors);
  check_step(twin);
}

TEST(random_layouts) {
  std::mt19937 random(7);
  for (uint32_t seed = 0; seed < 8; ++seed) {
    Twin twin(random_tensors(random, [&] { return 1 + random() % 4; }), seed);
    check_step(twin);
  }
}

TEST(aligned_tensors_are_written_16_bytes_at_a_time) {
  for (const Dtype dtype : all_dtypes()) {
    const int64_t chunk = kThreads * 16 / recap::dtype_size(dtype);
    Twin twin({{Update::adam_amsgrad, dtype, 3 * chunk}});
    auto& stores = emulation::machine().stores_of;
    std::fill(std::begin(stores), std::end(stores), 0);
    check_step(twin);
    CHECK_EQ(stores[16], size_t(4 * 3 * kThreads));
    CHECK_EQ(stores[2] + stores[4] + stores[8], size_t{0});
  }
}

TEST(gradients_are_left_at_zero_where_values_say_so) {
  std::mt19937 random(11);
  for (uint32_t seed = 0; seed < 4; ++seed) {
    const std::vector<Tensor> tensors = random_tensors(random, [&] { return 1 + random() % 4; });
    Twin twin(tensors, seed), before(tensors, seed);
    for (Twin::Side* side : {&twin.cpu, &twin.cuda}) {
      for (size_t i = seed % 2; i < side->step.values.size(); i += 2) {
        side->step.values[i].clears_grads = true;
      }
    }
    emulation::Machine& machine = emulation::machine();
    emulation::Stream* stream = machine.stream(0);
    {
      Engine engine(0, twin.cuda.plan, stream);
      engine.run(twin.cuda.step, stream);
    }
    machine.synchronize();
    twin.run_cpu();
    CHECK_EQ(twin.difference(), "");
    const auto clears = [&](size_t slot) {
      return twin.cuda.step.values[twin.cuda.step.values_of_slot[slot]].clears_grads;
    };
    CHECK_EQ(twin.wrong_gradient(clears, before), -1);
  }
}

TEST(several_steps_continue_from_each_other) {
  std::vector<Tensor> tensors;
  for (const Update update : all_updates()) tensors.push_back({update, Dtype::bfloat16, 5000});
  Twin twin(tensors);
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* stream = machine.stream(0);
  Engine engine(0, twin.cuda.plan, stream);
  for (int i = 0; i < 3; ++i) {
    engine.run(twin.cuda.step, stream);
    twin.run_cpu();
  }
  machine.synchronize();
  CHECK_EQ(twin.difference(), "");
}

TEST(a_step_is_one_launch_without_a_copy) {
  Twin twin({{Update::adam, Dtype::float32, 3 * kTileSize},
             {Update::sgd, Dtype::float64, 10},
             {Update::adagrad, Dtype::float16, 10}});
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* stream = machine.stream(0);
  Engine engine(0, twin.cuda.plan, stream);
  const size_t launches = machine.launches.size(), copies = machine.copies;
  CHECK_EQ(engine.launches(twin.cuda.step), 1);
  engine.run(twin.cuda.step, stream);
  CHECK_EQ(machine.launches.size(), launches + 1);
  CHECK_EQ(machine.copies, copies);
  CHECK_EQ(machine.launches.back().blocks, 5u, "one per tile");
  machine.synchronize();
}

TEST(nothing_to_do_is_no_launch) {
  Twin without_slots({});
  Twin empty({{Update::adam, Dtype::float32, 0}});
  Twin without_grad({{Update::adam, Dtype::float32, 5, false}, {Update::sgd, Dtype::float32, 0}});
  emulation::Machine& machine = emulation::machine();
  for (Twin* twin : {&without_slots, &empty, &without_grad}) {
    emulation::Stream* stream = machine.stream(0);
    const size_t launches = machine.launches.size();
    Engine engine(0, twin->cuda.plan, stream);
    CHECK_EQ(engine.launches(twin->cuda.step), 0);
    engine.run(twin->cuda.step, stream);
    CHECK_EQ(machine.launches.size(), launches);
    machine.synchronize();
    CHECK_EQ(twin->difference(), "");
  }
}

TEST(the_smallest_argument_that_fits_is_used) {
  const int small = recap::cuda::kSmallArguments, large = recap::cuda::kLargeArguments;
  for (const Dtype dtype : {Dtype::float32, Dtype::float64}) {
    for (const int entries : {1, 12}) {
      const int in_small = slots_that_fit(small, entries, dtype);
      const int in_large = slots_that_fit(large, entries, dtype);
      for (const auto& [slots, bytes] :
           {std::pair{entries, small}, std::pair{in_small, small}, std::pair{in_small + 1, large},
            std::pair{in_large, large}}) {
        Twin twin(many_small(slots, entries, dtype));
        const size_t launches = emulation::machine().launches.size();
        check_step(twin);
        CHECK_EQ(emulation::machine().launches.size(), launches + 1, slots, " slots");
        CHECK_EQ(emulation::machine().launches.back().argument_bytes, size_t(bytes), slots,
                 " slots");
      }
    }
  }
}

TEST(one_launch_has_room_for_3500_tensors_in_64_groups) {
  Twin twin(many_small(3500, 64));
  const size_t launches = emulation::machine().launches.size();
  check_step(twin);
  CHECK_EQ(emulation::machine().launches.size(), launches + 1);
  CHECK(slots_that_fit(recap::cuda::kLargeArguments, 64, Dtype::float64) >= 3200);
  CHECK(slots_that_fit(recap::cuda::kSmallArguments, 12, Dtype::float32) >= 400);
}

TEST(an_address_that_leaves_no_room_for_the_entry_is_refused) {
  Twin twin(many_small(3, 1));
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* stream = machine.stream(0);
  Engine engine(0, twin.cuda.plan, stream);
  recap::Step step = twin.cuda.step;
  step.grads[1] = reinterpret_cast<const void*>(uintptr_t{1} << 56);
  const size_t launches = machine.launches.size();
  CHECK(throws_naming("56 bits", [&] { engine.run(step, stream); }));
  CHECK_EQ(machine.launches.size(), launches);
  machine.synchronize();
}

TEST(what_does_not_fit_follows_in_further_launches) {
  const auto most = [](int entries, Dtype dtype = Dtype::float32) {
    return slots_that_fit(recap::cuda::kLargeArguments, entries, dtype);
  };
  std::vector<Tensor> with_gaps = many_small(8000, 3);
  for (size_t i = 0; i < with_gaps.size(); ++i) with_gaps[i].has_grad = i < 10 || i >= 7000;
  // The last slot brings in the double values of all entries, for which there is no room.
  std::vector<Tensor> late_float64 = many_small(most(12), 12);
  late_float64.back().dtype = Dtype::float64;
  const std::vector<std::pair<std::vector<Tensor>, int>> cases = {
      {many_small(most(12) + 1, 12), 2},
      {many_small(most(64) + 1, 64), 2},
      {many_small(most(12, Dtype::float64) + 1, 12, Dtype::float64), 2},
      {many_small(2 * most(1) + 1, 1), 3},
      {many_small(256, 256), 1},
      {many_small(257, 257), 2},
      {many_small(257, 257, Dtype::float64), 2},
      {with_gaps, 2},
      {late_float64, 2},
  };
  for (const auto& [tensors, expected] : cases) {
    Twin twin(tensors);
    emulation::Stream* stream = emulation::machine().stream(0);
    const size_t launches = emulation::machine().launches.size();
    CHECK_EQ(Engine(0, twin.cuda.plan, stream).launches(twin.cuda.step), expected);
    check_step(twin);
    CHECK_EQ(emulation::machine().launches.size(), launches + expected, tensors.size(), " slots");
  }
}

TEST(steps_and_engines_may_be_gone_before_they_run) {
  Twin twin({{Update::adam, Dtype::float32, 3000}, {Update::sgd_momentum, Dtype::float16, 99}});
  emulation::Machine& machine = emulation::machine();
  // The youngest stream runs first, so each of these must wait for the one before.
  emulation::Stream* building = machine.stream(0);
  emulation::Stream* first = machine.stream(0);
  emulation::Stream* second = machine.stream(0);
  {
    recap::Step step = twin.cuda.step;
    recap::Plan plan = twin.cuda.plan;
    auto engine = std::make_unique<Engine>(0, plan, building);
    engine->run(step, first);
    engine->run(step, second);
    engine.reset();
    // The next plan takes over while the steps of the last one wait to run.
    Engine next(0, plan, second);
    next.run(step, second);
    plan.tiles.clear();
    step.values.clear();
    step.grads.assign(step.grads.size(), nullptr);
  }
  machine.synchronize();
  for (int i = 0; i < 3; ++i) twin.run_cpu();
  CHECK_EQ(twin.difference(), "");
  CHECK_EQ(machine.allocated.size(), size_t{0});
}

TEST(an_engine_that_goes_while_its_stream_is_captured_is_no_part_of_the_graph) {
  Twin twin({{Update::adam, Dtype::float32, 100}});
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* stream = machine.stream(0);
  {
    Engine engine(0, twin.cuda.plan, stream);
    engine.run(twin.cuda.step, stream);
    machine.synchronize();
    stream->capturing = true;
  }
  stream->capturing = false;
  CHECK_EQ(stream->captured.size(), size_t{0});
  // So its table is not freed.
  CHECK_EQ(machine.allocated.size(), size_t{1});
  std::free(const_cast<void*>(machine.allocated.begin()->first));
  machine.allocated.clear();
}

TEST(each_engine_uses_its_device_and_restores_the_current_one) {
  Twin on_first({{Update::adam, Dtype::float32, 100}});
  Twin on_second({{Update::adagrad, Dtype::float32, 100}});
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* first = machine.stream(0);
  emulation::Stream* second = machine.stream(1);
  {
    Engine on_0(0, on_first.cuda.plan, first);
    Engine on_1(1, on_second.cuda.plan, second);
    CHECK_EQ(machine.device, 0);
    on_1.run(on_second.cuda.step, second);
    CHECK_EQ(machine.launches.back().device, 1);
    CHECK_EQ(machine.device, 0);
    on_0.run(on_first.cuda.step, first);
    CHECK_EQ(machine.launches.back().device, 0);
  }
  CHECK_EQ(machine.device, 0);
  machine.synchronize();
  CHECK_EQ(machine.allocated.size(), size_t{0});
  on_first.run_cpu();
  on_second.run_cpu();
  CHECK_EQ(on_first.difference() + on_second.difference(), "");
}

TEST(a_failed_launch_names_the_device_and_leaves_the_engine_usable) {
  Twin twin(many_small(5000, 1));
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* stream = machine.stream(1);
  Engine engine(1, twin.cuda.plan, stream);
  machine.synchronize();
  machine.calls_until_failure = 0;
  CHECK(throws_naming("CUDA device 1: cannot launch the optimizer step: invalid argument",
                      [&] { engine.run(twin.cuda.step, stream); }));
  CHECK_EQ(machine.device, 0);
  CHECK_EQ(cudaGetLastError(), cudaSuccess, "left for somebody else to find");
  engine.run(twin.cuda.step, stream);
  machine.synchronize();
  twin.run_cpu();
  CHECK_EQ(twin.difference(), "");
}

TEST(a_plan_that_cannot_be_built_leaves_nothing_behind) {
  Twin twin({{Update::adam, Dtype::float32, 100}});
  emulation::Machine& machine = emulation::machine();
  emulation::Stream* stream = machine.stream(0);
  int failures = 0;
  for (int call = 0;; ++call, ++failures) {
    machine.calls_until_failure = call;
    const bool failed = throws_naming("CUDA device 0: cannot ", [&] {
      Engine engine(0, twin.cuda.plan, stream);
      machine.calls_until_failure = -1;
    });
    machine.calls_until_failure = -1;
    machine.synchronize();
    CHECK_EQ(machine.allocated.size(), size_t{0}, "failure of call ", call);
    if (!failed) break;
  }
  CHECK_EQ(failures, 4, "event, allocation, copy, host function");
}

TEST(a_plan_with_unsuitable_tiles_is_refused) {
  Twin twin({{Update::adam, Dtype::float32, 2 * kTileSize}, {Update::adam, Dtype::float32, 5}});
  emulation::Stream* stream = emulation::machine().stream(0);
  recap::Plan too_large = twin.cuda.plan;
  too_large.tiles = recap::cut_tiles(too_large.slots, kTileSize + 1);
  recap::Plan out_of_order = twin.cuda.plan;
  std::swap(out_of_order.tiles.front(), out_of_order.tiles.back());
  for (const recap::Plan* plan : {&too_large, &out_of_order}) {
    CHECK(throws_naming("cuda::kTileSize", [&] { Engine(0, *plan, stream); }));
  }
}

// Four arrays of more than 2^31 elements, of which only the pages around the last tile exist.
TEST(more_elements_than_an_int_can_count) {
  constexpr int64_t kSize = (int64_t{1} << 32) + 1001, kBegin = kSize - 3001;
  constexpr size_t kBytes = kSize * sizeof(recap::BFloat16);
  const auto map = [] {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw check::Skip{"no address space for 8 GB"};
    return static_cast<recap::BFloat16*>(memory);
  };
  Twin twin({{Update::sgd, Dtype::bfloat16, kSize - kBegin}});
  recap::BFloat16* const param = map();
  recap::BFloat16* const grad = map();
  std::memcpy(param + kBegin, twin.cuda.arrays[0]->data(), twin.cuda.arrays[0]->size());
  std::memcpy(grad + kBegin, twin.cuda.arrays[1]->data(), twin.cuda.arrays[1]->size());

  recap::Plan plan = twin.cuda.plan;
  plan.slots[0].param = param;
  plan.slots[0].size = kSize;
  plan.tiles = {{0, kBegin, kSize - kBegin}};
  recap::Step step = twin.cuda.step;
  step.grads[0] = grad;
  emulation::Stream* stream = emulation::machine().stream(0);
  {
    Engine engine(0, plan, stream);
    engine.run(step, stream);
  }
  emulation::machine().synchronize();

  std::memcpy(twin.cuda.arrays[0]->data(), param + kBegin, twin.cuda.arrays[0]->size());
  munmap(param, kBytes);
  munmap(grad, kBytes);
  twin.run_cpu();
  CHECK_EQ(twin.difference(), "");
}

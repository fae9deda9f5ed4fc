// Steps whose values are computed on the device, on an emulated machine that runs blocks in a
// random order: the same bits as with values that the host computes.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "../plan/random_schedules.h"
#include "check.h"
#include "cuda/launch_arguments.h"
#include "device_twin.h"

using recap::cuda::DeviceStep;
using recap::cuda::Engine;
using recap::cuda::kTileSize;
using recap::cuda::RateTable;

namespace {

// The machine for one test: blocks run in a random order, and no work is left at the end.
struct RandomMachine {
  emulation::Machine& machine = emulation::machine();
  RandomMachine() { machine.shuffle_blocks = true; }
  ~RandomMachine() {
    machine.ticket_taken = machine.block_over = nullptr;
    machine.synchronize();
    machine.shuffle_blocks = false;
  }
};

// Runs `steps` steps on both sides and compares everything.
void check_steps(DeviceTwin& device, int steps = 1) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  device.twin.watch();
  {
    Engine engine(0, device.twin.cuda.plan, stream);
    for (int i = 0; i < steps; ++i) {
      engine.run(device.step, stream);
      random.machine.synchronize();
      device.run_cpu();
    }
  }
  random.machine.synchronize();
  CHECK_EQ(device.difference(), "");
  CHECK_EQ(device.twin.wrong_stores(device.found_inf != 0 ? 0 : steps), "");
  random.machine.watched.clear();
  CHECK_EQ(random.machine.allocated.size(), size_t{0});
}

std::vector<Tensor> many_small(int count, Dtype dtype = Dtype::float32) {
  std::vector<Tensor> tensors(count);
  for (int i = 0; i < count; ++i) {
    tensors[i].dtype = dtype;
    tensors[i].step = 1 + i % 5;
  }
  return tensors;
}

// One tensor of each update and dtype, of different sizes, in mixed groups.
std::vector<Tensor> one_of_each() {
  std::vector<Tensor> tensors;
  for (const Update update : all_updates()) {
    for (const Dtype dtype : all_dtypes()) {
      const int i = static_cast<int>(tensors.size());
      tensors.push_back({update, dtype, 1 + i * 37 % 600, true, {}, 1 + i % 4});
    }
  }
  return tensors;
}

// Rates in device memory, moved on by every step.
struct Rates {
  std::vector<Schedule> schedules;
  std::vector<double> table, rates;
  int64_t step;
  RateTable address;

  explicit Rates(const std::vector<Schedule>& schedules, int64_t step = 0)
      : schedules(schedules), table(pack(schedules)), step(step) {
    for (size_t i = 0; i < schedules.size(); ++i) {
      rates.push_back(recap::rate_at(table.data(), static_cast<int64_t>(i), step));
    }
    address = {table.data(), rates.data(), &this->step, static_cast<uint32_t>(schedules.size())};
  }
  Rates(const Rates&) = delete;
};

int slots_that_fit(int bytes, int groups) {
  const int header = sizeof(recap::cuda::DeviceArgumentsHeader);
  return (bytes - header - groups * static_cast<int>(sizeof(recap::cuda::DeviceGroup))) / 8;
}

}  // namespace

TEST(device_values_for_every_update_and_dtype) {
  std::vector<Tensor> tensors = one_of_each();
  for (const Update update : all_updates()) {
    tensors.push_back({update, Dtype::float32, 2 * kTileSize + 3, true, {0, 1, 2, 3, 1}, 1});
    tensors.push_back({update, Dtype::float64, kTileSize + 1, true, {}, 2});
  }
  DeviceTwin device(tensors);
  check_steps(device, 3);
}

TEST(device_values_for_random_layouts) {
  std::mt19937 random(7);
  for (uint32_t seed = 0; seed < 6; ++seed) {
    const auto step = [&] { return 1 + (random() % 3 ? random() % 4 : random() % 1000000); };
    DeviceTwin device(random_tensors(random, step), seed);
    check_steps(device, 2);
  }
}

TEST(rates_in_device_memory_change_from_step_to_step) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  DeviceTwin device(one_of_each());
  Engine engine(0, device.twin.cuda.plan, stream);
  for (const double rate : {0.1, 0.0, 1.0 / 3, 1e-9}) {
    device.set_rate(rate);
    engine.run(device.step, stream);
    random.machine.synchronize();
    device.run_cpu();
    CHECK_EQ(device.difference(), "");
  }
}

TEST(a_scale_is_read_when_the_step_runs) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  DeviceTwin device(one_of_each());
  Engine engine(0, device.twin.cuda.plan, stream);
  for (const float scale : {65536.0f, 7.0f, 0.5f}) {
    engine.run(device.step, stream);
    device.grad_scale = scale;
    random.machine.synchronize();
    device.run_cpu();
    CHECK_EQ(device.difference(), "");
  }
  device.step.grad_scale = nullptr;
  device.step.found_inf = nullptr;
  engine.run(device.step, stream);
  random.machine.synchronize();
  device.run_cpu();
  CHECK_EQ(device.difference(), "");
}

TEST(nothing_changes_where_infinities_were_found) {
  Rates rates({{ScheduleKind::linear_ramp_to_constant, {1, 100}}}, 5);
  for (const float found : {1.0f, 2.0f, std::numeric_limits<float>::quiet_NaN()}) {
    DeviceTwin device(one_of_each());
    device.found_inf = found;
    device.step.rates = &rates.address;
    const int64_t step = rates.step;
    check_steps(device, 2);
    CHECK_EQ(rates.step, step + 2, "schedules go on");
    CHECK_EQ(rates.rates[0], 0.01 * static_cast<double>(step + 2));
  }
}

TEST(a_skipped_step_leaves_no_trace_in_the_next) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  DeviceTwin device(one_of_each());
  Engine engine(0, device.twin.cuda.plan, stream);
  for (const float found : {0.0f, 1.0f, 0.0f, 0.0f, 1.0f, 1.0f, 0.0f}) {
    device.found_inf = found;
    engine.run(device.step, stream);
    random.machine.synchronize();
    device.run_cpu();
    CHECK_EQ(device.difference(), "");
  }
}

TEST(gradients_are_left_at_zero_in_steps_that_are_skipped_too) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  for (const float found_inf : {0.0f, 1.0f}) {
    std::vector<Tensor> tensors = one_of_each();
    tensors.push_back({Update::adam, Dtype::float16, 2 * kTileSize + 3, true, {0, 1, 2, 3, 1}});
    tensors.push_back({Update::sgd, Dtype::float32, kTileSize + 5, false});
    DeviceTwin device(tensors), before(tensors);
    device.found_inf = found_inf;
    auto& groups = device.step.groups;
    for (size_t i = 0; i < groups.size(); i += 2) groups[i].hyper.clears_grads = true;
    {
      Engine engine(0, device.twin.cuda.plan, stream);
      engine.run(device.step, stream);
    }
    random.machine.synchronize();
    const auto clears = [&](size_t slot) { return device.step.group_of_slot[slot] % 2 == 0; };
    CHECK_EQ(device.twin.wrong_gradient(clears, before.twin), -1, "found_inf ", found_inf);
    device.run_cpu();
    for (size_t slot = 0; found_inf != 0 && slot < tensors.size(); ++slot) {
      Guarded& grad = *device.twin.cpu.arrays[slot * kTwinArrays + 1];
      if (tensors[slot].has_grad && clears(slot)) std::fill_n(grad.data(), grad.size(), 0);
    }
    CHECK_EQ(device.difference(), "");
  }
}

TEST(each_slot_counts_its_own_steps) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  DeviceTwin device(one_of_each());
  const std::vector<const void*> grads = device.step.grads;
  Engine engine(0, device.twin.cuda.plan, stream);
  std::mt19937 choose(3);
  for (int i = 0; i < 6; ++i) {
    for (size_t slot = 0; slot < grads.size(); ++slot) {
      const bool has_grad = choose() % 3 != 0;
      device.step.grads[slot] = has_grad ? grads[slot] : nullptr;
      device.twin.cpu.step.grads[slot] =
          has_grad ? device.twin.cpu.arrays[slot * kTwinArrays + 1]->data() : nullptr;
    }
    engine.run(device.step, stream);
    random.machine.synchronize();
    device.run_cpu();
    CHECK_EQ(device.difference(), "");
  }
}

TEST(empty_tensors_with_a_gradient_count_too) {
  const Tensor empty = {Update::adam, Dtype::float32, 0};
  Tensor without_grad = empty;
  without_grad.has_grad = false;
  for (const std::vector<Tensor>& tensors :
       {std::vector<Tensor>{empty}, std::vector<Tensor>{empty, without_grad, empty},
        std::vector<Tensor>{empty, {Update::sgd, Dtype::float32, 5}, empty, without_grad}}) {
    DeviceTwin device(tensors);
    const size_t launches = emulation::machine().launches.size();
    check_steps(device, 3);
    CHECK_EQ(emulation::machine().launches.size(), launches + 3);
  }
}

TEST(without_a_gradient_there_is_a_launch_for_the_rates_alone) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  Rates rates({{ScheduleKind::linear_ramp_to_constant, {1, 10}}});
  const std::vector<Tensor> without_grad = {{Update::adam, Dtype::float32, 5, false},
                                            {Update::sgd, Dtype::float64, 7, false}};
  for (const auto& tensors : {std::vector<Tensor>{}, without_grad}) {
    rates.step = 0;
    DeviceTwin device(tensors);
    Engine engine(0, device.twin.cuda.plan, stream);
    const size_t launches = random.machine.launches.size();
    CHECK_EQ(engine.launches(device.step), 0);
    engine.run(device.step, stream);
    CHECK_EQ(random.machine.launches.size(), launches);
    device.step.rates = &rates.address;
    CHECK_EQ(engine.launches(device.step), 1);
    for (int i = 1; i <= 3; ++i) {
      engine.run(device.step, stream);
      random.machine.synchronize();
      CHECK_EQ(rates.step, int64_t{i});
      CHECK_EQ(rates.rates[0], 0.1 * i);
    }
    CHECK_EQ(random.machine.launches.size(), launches + 3);
    CHECK_EQ(random.machine.launches.back().blocks, 1u);
    CHECK_EQ(device.difference(), "");
  }
}

TEST(a_step_with_device_values_is_one_launch_without_a_copy) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  DeviceTwin device({{Update::adam, Dtype::float32, 3 * kTileSize},
                     {Update::sgd, Dtype::float64, 10},
                     {Update::adagrad, Dtype::float16, 10}});
  Engine engine(0, device.twin.cuda.plan, stream);
  const size_t launches = random.machine.launches.size(), copies = random.machine.copies;
  CHECK_EQ(engine.launches(device.step), 1);
  engine.run(device.step, stream);
  CHECK_EQ(random.machine.launches.size(), launches + 1);
  CHECK_EQ(random.machine.copies, copies);
  CHECK_EQ(random.machine.launches.back().blocks, 5u, "one per tile");
  random.machine.synchronize();
}

TEST(one_launch_with_device_values_has_room_for_3500_tensors_in_64_groups) {
  CHECK(slots_that_fit(recap::cuda::kLargeArguments, 64) >= 3500);
  CHECK(slots_that_fit(recap::cuda::kSmallArguments, 12) >= 390);
}

TEST(the_smallest_argument_that_fits_device_values_is_used) {
  const int small = recap::cuda::kSmallArguments, large = recap::cuda::kLargeArguments;
  const int in_small = slots_that_fit(small, 2), in_large = slots_that_fit(large, 2);
  for (const Dtype dtype : {Dtype::float32, Dtype::float64}) {
    for (const auto& [slots, bytes] :
         {std::pair{in_small, small}, std::pair{in_small + 1, large}, std::pair{in_large, large}}) {
      DeviceTwin device(many_small(slots, dtype));
      const size_t launches = emulation::machine().launches.size();
      check_steps(device);
      CHECK_EQ(emulation::machine().launches.size(), launches + 1, slots, " slots");
      CHECK_EQ(emulation::machine().launches.back().argument_bytes, size_t(bytes));
    }
  }
}

TEST(device_values_that_do_not_fit_follow_in_further_launches) {
  std::vector<Tensor> with_gaps = many_small(9000);
  for (size_t i = 0; i < with_gaps.size(); ++i) with_gaps[i].has_grad = i < 10 || i >= 7000;
  const int most = slots_that_fit(recap::cuda::kLargeArguments, 2);
  for (const auto& [tensors, expected] :
       {std::pair{many_small(most + 1), 2}, std::pair{many_small(2 * most + 1), 3},
        std::pair{with_gaps, 2}}) {
    DeviceTwin device(tensors);
    // The groups' rates are those that the last launch, and no other, moves on.
    Rates rates({{ScheduleKind::linear_ramp_to_constant, {1, 10}}}, 3);
    device.step.rates = &rates.address;
    for (auto& group : device.step.groups) {
      group.lr = rates.rates.data();
      group.lr_is_double = true;
    }
    RandomMachine random;
    emulation::Stream* stream = random.machine.stream(0);
    Engine engine(0, device.twin.cuda.plan, stream);
    CHECK_EQ(engine.launches(device.step), expected);
    const size_t launches = random.machine.launches.size();
    for (int i = 1; i <= 2; ++i) {
      device.run_cpu();
      engine.run(device.step, stream);
      random.machine.synchronize();
      CHECK_EQ(device.difference(), "");
      CHECK_EQ(rates.step, int64_t{3 + i});
    }
    CHECK_EQ(random.machine.launches.size(), launches + 2 * expected);
  }
}

TEST(rates_follow_their_schedules_for_thousands_of_steps) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  Rates rates({{ScheduleKind::constant, {0.25}},
               {ScheduleKind::piecewise_constant, {}, {1, 10, 1500}, {0.1, 0.2, 0.3, 0.4}},
               {ScheduleKind::linear_ramp_to_constant, {0.5, 1000}},
               {ScheduleKind::linear_ramp_to_cosine, {0.5, 300, 0.0, 2500}},
               {ScheduleKind::linear_ramp_to_cosine, {0.1, 1, 0.05, 2}}});
  std::vector<Tensor> tensors;
  for (const Update update : {Update::adam, Update::adagrad_l2, Update::sgd_momentum, Update::sgd,
                              Update::adam_amsgrad_l2}) {
    tensors.push_back({update, Dtype::float32, 3, true, {}, 1});
  }
  DeviceTwin device(tensors);
  device.step.rates = &rates.address;
  for (size_t i = 0; i < device.step.groups.size(); ++i) {
    device.step.groups[i].lr = &rates.rates[i];
    device.step.groups[i].lr_is_double = true;
  }
  Engine engine(0, device.twin.cuda.plan, stream);
  for (int64_t step = 0; step <= 3000; ++step) {
    CHECK_EQ(rates.step, step);
    for (size_t i = 0; i < rates.rates.size(); ++i) {
      const long double error = std::fabs(rates.rates[i] - exact_rate(rates.schedules[i], step));
      CHECK(error <= 4e-16L * largest_rate(rates.schedules[i]), "schedule ", i, " at step ", step);
    }
    device.run_cpu();  // with the rates of now
    engine.run(device.step, stream);
    random.machine.synchronize();
  }
  CHECK_EQ(device.difference(), "");
}

TEST(a_schedule_for_each_of_many_groups) {
  std::vector<Schedule> schedules;
  for (int i = 0; i < 600; ++i) {  // more than a block has threads
    schedules.push_back({ScheduleKind::linear_ramp_to_constant, {i / 512.0, 8}});
  }
  Rates rates(schedules, 1);
  DeviceTwin device(one_of_each());
  device.step.rates = &rates.address;
  check_steps(device, 2);
  for (int i = 0; i < 600; ++i) CHECK_EQ(rates.rates[i], i / 512.0 / 8 * 3, "schedule ", i);
}

// From its ticket on, the last block may have moved the step's numbers on.
TEST(nothing_that_the_last_block_changes_is_read_behind_a_ticket) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  Rates rates({{ScheduleKind::linear_ramp_to_constant, {0.5, 10}}}, 4);
  DeviceTwin device(one_of_each());
  device.step.rates = &rates.address;
  for (size_t i = 0; i < device.step.groups.size(); i += 2) {
    device.step.groups[i].lr = rates.rates.data();
    device.step.groups[i].lr_is_double = true;
  }
  float* const counts = device.step.counts;
  std::vector<float> counted;  // while other numbers are in their place
  double rate = 0.0;
  int tickets = 0;
  random.machine.ticket_taken = [&] {
    ++tickets;
    counted.assign(counts, counts + device.step.grads.size());
    std::fill_n(counts, counted.size(), 1e6f);
    rate = std::exchange(rates.rates[0], 7.0);
  };
  random.machine.block_over = [&] {
    if (counted.empty()) return;
    std::copy(counted.begin(), counted.end(), counts);
    rates.rates[0] = rate;
    counted.clear();
  };
  Engine engine(0, device.twin.cuda.plan, stream);
  for (int i = 0; i < 2; ++i) {
    device.run_cpu();
    engine.run(device.step, stream);
    random.machine.synchronize();
    CHECK_EQ(device.difference(), "");
  }
  CHECK_EQ(rates.step, int64_t{6});
  CHECK_EQ(tickets, 2 * (int(device.twin.cuda.plan.tiles.size()) - 1));
}

TEST(a_captured_step_is_the_next_step_at_each_replay) {
  RandomMachine random;
  emulation::Stream* building = random.machine.stream(0);
  emulation::Stream* capturing = random.machine.stream(0);
  Rates rates({{ScheduleKind::linear_ramp_to_cosine, {0.5, 3, 0.25, 9}}});
  DeviceTwin device(one_of_each());
  device.step.rates = &rates.address;
  for (size_t i = 0; i < device.step.groups.size(); i += 2) {
    device.step.groups[i].lr = rates.rates.data();
    device.step.groups[i].lr_is_double = true;
  }
  // The CPU's step is run first, with the rates from before the other's.
  {
    Engine engine(0, device.twin.cuda.plan, building);
    device.run_cpu();
    engine.run(device.step, building);
    random.machine.synchronize();
    CHECK_EQ(device.difference(), "");
    CHECK(!recap::cuda::is_capturing(0, capturing));
    capturing->capturing = true;
    CHECK(recap::cuda::is_capturing(0, capturing));
    engine.run(device.step, capturing);
    capturing->capturing = false;
    CHECK(!recap::cuda::is_capturing(0, capturing));
    CHECK_EQ(capturing->captured.size(), size_t{1}, "one node in the graph");
    for (int replay = 0; replay < 4; ++replay) {
      device.run_cpu();
      random.machine.replay(capturing);
      random.machine.synchronize();
      CHECK_EQ(device.difference(), "", "after replay ", replay);
    }
    // Not captured, on the stream of before and on the other.
    for (emulation::Stream* stream : {building, capturing}) {
      device.run_cpu();
      engine.run(device.step, stream);
      random.machine.synchronize();
      CHECK_EQ(device.difference(), "");
    }
  }
  // The graph outlives the engine, and several replays may wait at a time.
  for (const float found : {0.0f, 1.0f, 0.0f}) {
    device.found_inf = found;
    device.run_cpu();
    random.machine.replay(capturing);
    random.machine.synchronize();
    CHECK_EQ(device.difference(), "");
  }
  CHECK_EQ(rates.step, int64_t{10});
  // What the graph needs is not freed, but nobody else's.
  CHECK_EQ(random.machine.allocated.size(), size_t{1});
  std::free(const_cast<void*>(random.machine.allocated.begin()->first));
  random.machine.allocated.clear();
}

TEST(values_from_the_host_and_from_the_device_take_turns) {
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  DeviceTwin device(one_of_each());
  Engine engine(0, device.twin.cuda.plan, stream);
  recap::Step host = device.twin.cuda.step;
  for (int i = 0; i < 3; ++i) {
    engine.run(device.step, stream);
    random.machine.synchronize();
    device.run_cpu();
    engine.run(host, stream);
    random.machine.synchronize();
    std::swap(host.values, device.twin.cpu.step.values);
    std::swap(host.values_of_slot, device.twin.cpu.step.values_of_slot);
    device.twin.run_cpu();
    std::swap(host.values, device.twin.cpu.step.values);
    std::swap(host.values_of_slot, device.twin.cpu.step.values_of_slot);
    CHECK_EQ(device.difference(), "");
  }
}

TEST(steps_with_device_values_may_run_after_their_engine_is_gone) {
  RandomMachine random;
  DeviceTwin device(one_of_each());
  // The youngest stream runs first, so each of these must wait for the one before.
  emulation::Stream* building = random.machine.stream(0);
  emulation::Stream* first = random.machine.stream(0);
  emulation::Stream* second = random.machine.stream(0);
  {
    DeviceStep step = device.step;
    auto engine = std::make_unique<Engine>(0, device.twin.cuda.plan, building);
    engine->run(step, first);
    engine->run(step, second);
    engine.reset();
    Engine next(0, device.twin.cuda.plan, second);
    next.run(step, second);
    step.groups.clear();
    step.grads.assign(step.grads.size(), nullptr);
  }
  random.machine.synchronize();
  for (int i = 0; i < 3; ++i) device.run_cpu();
  CHECK_EQ(device.difference(), "");
  CHECK_EQ(random.machine.allocated.size(), size_t{0});
}

TEST(immediate_work_needs_no_stream) {
  RandomMachine random;
  random.machine.immediate = true;
  DeviceTwin device(one_of_each());
  {
    Engine engine(0, device.twin.cuda.plan, nullptr);
    engine.run(device.step, nullptr);
    device.run_cpu();
    CHECK_EQ(device.difference(), "");
    CHECK(!recap::cuda::is_capturing(0, nullptr));
  }
  random.machine.immediate = false;
  CHECK_EQ(random.machine.allocated.size(), size_t{0});
}

TEST(a_float_stops_counting_at_2_to_the_24) {
  DeviceTwin device({{Update::adam, Dtype::float32, 5, true, {}, (1 << 24) - 1}});
  check_steps(device, 4);
  CHECK_EQ(device.step.counts[0], 0x1p24f);
}

TEST(a_gradient_without_a_place_to_count_is_refused) {
  DeviceTwin device({{Update::adam, Dtype::float32, 5}});
  RandomMachine random;
  emulation::Stream* stream = random.machine.stream(0);
  Engine engine(0, device.twin.cuda.plan, stream);
  device.step.counts = nullptr;
  const size_t launches = random.machine.launches.size();
  bool refused = false;
  try {
    engine.run(device.step, stream);
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("step counts") != std::string::npos;
  }
  CHECK(refused);
  CHECK_EQ(random.machine.launches.size(), launches);
}

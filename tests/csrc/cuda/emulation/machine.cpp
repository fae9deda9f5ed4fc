// The one machine that cuda_runtime.h emulates.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <array>
#include <csetjmp>

namespace emulation {

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

Stream* Machine::stream(int device) {
  streams.push_back(std::make_unique<Stream>());
  streams.back()->device = device;
  return streams.back().get();
}

void Machine::replay(Stream* stream) {
  for (const auto& work : stream->captured) stream->work.push_back(work);
  if (immediate) synchronize();
}

void Machine::synchronize() {
  for (bool progress = true; progress;) {
    progress = false;
    for (auto stream = streams.rbegin(); stream != streams.rend(); ++stream) {
      auto& work = (*stream)->work;
      while (!work.empty() && work.front()()) {
        work.pop_front();
        progress = true;
      }
    }
  }
  for (const auto& stream : streams) {
    if (!stream->work.empty()) std::abort();  // streams that wait for each other
  }
}

namespace {

constexpr size_t kStackBytes = 256 * 1024;

// A thread on a stack of its own. A context is for its first turn only: to go on with one takes a
// call of the system.
struct Lane {
  std::jmp_buf place;
  bool has_place = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool is_over = true;
  int exchanges = 0;
  unsigned given[2] = {};  // in turn: a thread may be one exchange ahead
};

struct Warp {
  std::array<Lane, kWarp> lanes;
  std::jmp_buf caller;
  const std::function<void()>* run = nullptr;
  unsigned first = 0;

  Lane& current() { return lanes[thread.x - first]; }
};

Warp& warp() {
  static thread_local Warp the_warp;
  return the_warp;
}

// Goes on with the caller, until the lane's next turn.
void end_turn(Lane& lane) {
  if (_setjmp(lane.place) == 0) _longjmp(warp().caller, 1);
}

[[noreturn]] void run_lane() {
  for (;;) {
    (*warp().run)();
    Lane& lane = warp().current();
    lane.is_over = true;
    end_turn(lane);
  }
}

void begin_turn(Lane& lane) {
  if (_setjmp(warp().caller) != 0) return;
  if (lane.has_place) _longjmp(lane.place, 1);
  lane.has_place = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = lane.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_lane, 0);
  setcontext(&context);
}

}  // namespace

void run_warp(unsigned first, const std::function<void()>& run) {
  Warp& w = warp();
  w.run = &run;
  w.first = first;
  for (Lane& lane : w.lanes) {
    lane.is_over = false;
    lane.exchanges = 0;
  }
  while (!w.lanes[0].is_over) {
    for (unsigned i = 0; i < kWarp; ++i) {
      thread.x = first + i;
      begin_turn(w.lanes[i]);
      // They would wait for each other, were they threads of a GPU.
      const Lane &lane = w.lanes[i], &before = w.lanes[0];
      if (lane.exchanges != before.exchanges || lane.is_over != before.is_over) std::abort();
    }
  }
}

unsigned exchange(unsigned value, int lanes) {
  Warp& w = warp();
  Lane& own = w.current();
  const int turn = own.exchanges++ % 2;
  own.given[turn] = value;
  end_turn(own);
  return w.lanes[(thread.x - w.first) ^ static_cast<unsigned>(lanes)].given[turn];
}

}  // namespace emulation

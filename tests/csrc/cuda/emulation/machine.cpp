// The one machine that cuda_runtime.h emulates.
#include <cuda_runtime.h>

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

}  // namespace emulation

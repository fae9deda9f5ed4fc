// In the place of the engine, where it is not built.
#include <stdexcept>

#include "engine.h"

namespace recap::cuda {

bool has_engine() { return false; }

class Engine::Implementation {};

Engine::Engine(int, const Plan&, void*) {
  throw std::logic_error("this build of recap_fast has no CUDA engine");
}

Engine::~Engine() = default;
void Engine::run(const Step&, void*) {}
void Engine::run(const DeviceStep&, void*) {}
int Engine::launches(const Step&) { return 0; }
int Engine::launches(const DeviceStep&) { return 0; }

bool is_capturing(int, void*) { return false; }

}  // namespace recap::cuda

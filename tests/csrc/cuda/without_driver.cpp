// Linked with the CUDA engine as nvcc built it: starts without a driver, and says what CUDA says of
// the devices when asked for a step.
#include <exception>
#include <iostream>

#include "cuda/engine.h"

int main() {
  try {
    recap::cuda::Engine engine(0, recap::Plan(), nullptr);
    std::cout << "a device" << std::endl;
  } catch (const std::exception& error) {
    std::cout << error.what() << std::endl;
  }
}

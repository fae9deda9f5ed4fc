// torch's own intra-op thread pool, lent to the CPU engine, so that torch.set_num_threads holds.
#pragma once

#include "../cpu/engine.h"

namespace recap {

cpu::ThreadPool torch_thread_pool();

}  // namespace recap

// Stacks of their own, and jumps between them and the stack of the scheduler.
#pragma once

#include <setjmp.h>

#include <cstddef>

namespace emulator {

// A fiber that was left in the middle of a run can be begun again; nothing is destroyed then.
struct Fiber {
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  bool begun = false;
  char* stack;
  size_t size;
  jmp_buf context;
};

// Runs a fiber until it calls `leave`. It begins with `fiber_main`, which never returns.
void enter(Fiber& fiber);
void leave(Fiber& fiber);
void fiber_main();

}  // namespace emulator

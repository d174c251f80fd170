// makecontext begins a fiber; from then on _setjmp and _longjmp switch, because swapcontext calls
// the kernel to save the signal mask.
#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

namespace emulator {
namespace {

constexpr size_t kGuard = 4 << 10, kStack = 128 << 10, kMapped = kGuard + kStack;
// Stacks begin at different places of a page: else they would share the same lines of the cache.
constexpr size_t kStaggers = 61, kStagger = 512;

jmp_buf scheduler;
size_t fibers_made = 0;

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kMapped, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack = static_cast<char*>(memory);
  mprotect(stack, kGuard, PROT_NONE);
  size = kStack - fibers_made++ % kStaggers * kStagger;
}

Fiber::~Fiber() { munmap(stack, kMapped); }

[[gnu::noinline]] void enter(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.context, 1);
  fiber.begun = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack + kGuard;
  start.uc_stack.ss_size = fiber.size;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
  setcontext(&start);
}

[[gnu::noinline]] void leave(Fiber& fiber) {
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

}  // namespace emulator

// Cooperative fibers: each has a stack of its own and runs until it hands control back. On x86-64 a switch is a dozen
// instructions; elsewhere ucontext does it. Address sanitizer is told about every change of stack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__x86_64__)
#define MOERGE_FIBER_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

namespace moerge::simt {

// Where one line of control stands while it does not run.
struct Context {
#ifdef MOERGE_FIBER_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
  const void* bottom = nullptr;  // of its stack, for the sanitizer; null: the thread's own stack
  size_t size = 0;
  void* fake_stack = nullptr;
};

class Fiber {
 public:
  Fiber();
  // Makes the next `resume` start `entry` from the top of the stack; entry must not return.
  void prepare(void (*entry)());
  // Runs the fiber until it yields to `home`.
  void resume(Context& home);
  void yield(Context& home);

 private:
  static constexpr size_t kStack = 256 * 1024;
  std::unique_ptr<char[]> stack_;
  Context context_;
};

// To be called first thing on a new stack.
void fiber_started(Context& home);

}  // namespace moerge::simt

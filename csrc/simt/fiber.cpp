// Switching between fibers (fiber.h).
#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef MOERGE_FIBER_ASSEMBLY
// moerge_switch_stack(save, load): stores the callee-saved registers and the stack pointer, and takes up the other's.
asm(R"(
.text
.p2align 4
.type moerge_switch_stack, @function
moerge_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moerge_switch_stack, .-moerge_switch_stack
)");
extern "C" void moerge_switch_stack(void** save, void* load);
#endif

namespace moerge::simt {

namespace {

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#ifdef MOERGE_FIBER_ASSEMBLY
  moerge_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
#endif
}

}  // namespace

Fiber::Fiber() : stack_(new char[kStack]) {
  context_.bottom = stack_.get();
  context_.size = kStack;
}

void Fiber::prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_.get(), kStack);
#endif
#ifdef MOERGE_FIBER_ASSEMBLY
  // as the switch leaves a stack: six registers, then the address to return to; a call leaves it 8 off a multiple of 16
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStack) & ~uintptr_t(15);
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  context_.stack_pointer = slot;
#else
  getcontext(&context_.state);
  context_.state.uc_stack.ss_sp = stack_.get();
  context_.state.uc_stack.ss_size = kStack;
  context_.state.uc_link = nullptr;
  makecontext(&context_.state, entry, 0);
#endif
  context_.fake_stack = nullptr;
}

void Fiber::resume(Context& home) { switch_context(home, context_); }
void Fiber::yield(Context& home) { switch_context(context_, home); }

void fiber_started(Context& home) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home.bottom, &home.size);
#else
  (void)home;
#endif
}

}  // namespace moerge::simt

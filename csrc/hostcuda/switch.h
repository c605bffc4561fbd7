// Leaving one stack for another. On x86-64 without the two system calls of `swapcontext`, which keeps signal masks: fibers
// change none, and a warp's lanes change places at every exchange.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastft::hostcuda {

#if defined(__x86_64__)

// Where a stack was left; what the System V ABI has a callee keep lies on top of it.
struct Context {
  void** top = nullptr;
};

// Only the registers: no fiber changes the rounding modes of floating point.
extern "C" void fastft_hostcuda_switch(void*** left, void** entered);
asm(R"(
.pushsection .text
.type fastft_hostcuda_switch, @function
fastft_hostcuda_switch:
  .cfi_startproc
  endbr64
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
  .cfi_endproc
.size fastft_hostcuda_switch, . - fastft_hostcuda_switch
.popsection
)");

inline void switch_context(Context& left, const Context& entered) { fastft_hostcuda_switch(&left.top, entered.top); }

// The first switch to `context` calls `main`, which must not return.
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*main)()) {
  void** end = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  // At a function's first instruction the stack is 8 bytes below a multiple of 16; a null frame pointer and return address
  // end a stack trace.
  context.top = end - 8;
  for (int i = 0; i < 6; ++i) context.top[i] = nullptr;
  context.top[6] = reinterpret_cast<void*>(main);
  context.top[7] = nullptr;
}

#else

using Context = ucontext_t;

inline void switch_context(Context& left, const Context& entered) { swapcontext(&left, &entered); }

inline void prepare_context(Context& context, char* stack, size_t bytes, void (*main)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, main, 0);
  // AddressSanitizer's swapcontext would unpoison this whole stack at every switch, red zones included.
  context.uc_stack.ss_size = 0;
}

#endif

}  // namespace fastft::hostcuda

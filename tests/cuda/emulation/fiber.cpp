#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace hierkernels::emulation {
namespace {

unsigned char* new_stack() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* p = mmap(nullptr, kStackBytes + guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  unsigned char* stack = static_cast<unsigned char*>(p) + guard;
  if (mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  return stack;
}

}  // namespace

#if defined(__x86_64__)

// Saves what a called function must preserve, changes stacks, restores. swapcontext does the same with two calls
// of the system, which would be most of the time.
asm(R"(
.text
.local hierkernels_switch_stack
.type hierkernels_switch_stack, @function
hierkernels_switch_stack:
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
)");
extern "C" __attribute__((visibility("hidden"))) void hierkernels_switch_stack(void** save, void* load);

void prepare(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) fiber.stack = new_stack();
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // the return address of entry: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  fiber.context = top - 6;  // six registers, whatever they hold
}

void switch_fiber(Fiber& from, Fiber& to) { hierkernels_switch_stack(&from.context, to.context); }

#else

void prepare(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) fiber.stack = new_stack();
  if (!fiber.context) fiber.context = new ucontext_t;
  ucontext_t* c = static_cast<ucontext_t*>(fiber.context);
  getcontext(c);
  c->uc_stack.ss_sp = fiber.stack;
  c->uc_stack.ss_size = kStackBytes;
  c->uc_link = nullptr;
  makecontext(c, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (!from.context) from.context = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
}

#endif

}  // namespace hierkernels::emulation

// Stacks that a thread of the host can switch between.
#pragma once
#include <cstddef>

namespace hierkernels::emulation {

constexpr size_t kStackBytes = 256 * 1024;

struct Fiber {
  void* context = nullptr;         // where to go on: set by switch_fiber
  unsigned char* stack = nullptr;  // kStackBytes, with a guard page below; null for the host's own
};

// Makes `fiber` start `entry` (which must never return) at the next switch to it; takes a stack on first use.
void prepare(Fiber& fiber, void (*entry)());
// Goes on in `to`; returns when something switches back to `from`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace hierkernels::emulation

// The block that runs: its threads, warps and barriers, and how threads meet. For the emulation's own files.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace hierkernels::emulation {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;

// Logical time: what a thread knows of the steps of all others. An access is ordered before another if the thread
// of the second knows the step of the first.
using Clock = std::vector<uint32_t>;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, source_bytes;
};

struct Thread {
  enum State { kReady, kWaiting, kDone };
  int number = 0, lane = 0, warp = 0;
  Index index;
  Fiber fiber;
  State state = kReady;
  const char* waits_for = "";
  std::vector<Copy> open;                 // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;   // committed, oldest first
  Clock clock;
};

// Lanes of a warp that came to the same instruction.
struct Meeting {
  const char* instruction = nullptr;  // null: free
  uint32_t mask = 0, here = 0;
  std::array<void*, kLanes> payload;
};

struct Warp {
  std::vector<Thread*> ready;
  std::array<Meeting, 4> meetings;  // with different masks
};

struct Barrier {
  int needed = 0, arrived = 0;
  std::vector<Thread*> waiting, all;
  Clock clock;
};

struct Block {
  Index index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
};

extern Block block;
extern Thread* current;  // null outside of a kernel

// Ends the launch with an error of the current thread; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

uint64_t random_below(uint64_t n);

// ---- shared_memory.cpp ----

void reset_shared_memory(size_t bytes);
enum class Access { kRead, kWrite, kCopyStarts };
// The current thread reads or writes shared memory: must be in bounds, ordered, and initialised if read.
void touch_shared(const void* p, size_t bytes, Access access, const char* what);
void check_global(const void* p, size_t bytes, const char* what);

// ---- clocks ----

void join(Clock& into, const Clock& from);
// All these threads know what each of them did.
void synchronise(const std::vector<Thread*>& threads);

// ---- warps ----

// The lanes of mask come here, each with a payload; the last one runs action(payloads by lane); then all go on.
void meet(const char* instruction, uint32_t mask, void* payload,
          const std::function<void(const std::array<void*, kLanes>&)>& action);

}  // namespace hierkernels::emulation

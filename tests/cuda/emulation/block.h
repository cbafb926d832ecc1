// The block that runs: its threads, warps and barriers, and how threads meet. For the emulation's own files.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace hierkernels::emulation {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;  // of a block, on sm_90

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
  uint32_t proxy_fences = 0;              // fence.proxy.async so far
  Clock clock;
};

// Lanes of a warp that came to the same instruction.
struct Meeting {
  const char* instruction = nullptr;  // null: free
  uint32_t mask = 0, here = 0;
  std::array<void*, kLanes> payload;
};

// A warp's 16 rows of a wgmma that has not been waited for.
struct Product {
  Element element;
  int n;
  bool accumulate, b_transposed, a_in_registers;
  uint64_t a, b;
  std::array<float*, kLanes> d;
  std::array<std::array<uint32_t, 4>, kLanes> a_words;
  std::array<const uint32_t*, kLanes> a_words_at;
  bool follows;              // another product on the same sums comes before it
  std::vector<float> sums;   // what is added to, of each lane; the registers hold poison
  Clock begun;               // what was known when it began: all that it reads must have been written then
};

struct Warp {
  std::vector<Thread*> ready;
  std::array<Meeting, 4> meetings;  // with different masks
  std::vector<Product> products;               // since the last commit
  std::deque<std::vector<Product>> committed;  // oldest first
  bool wgmma_fenced = false;
  int registers = 0;  // of each thread, by setmaxnreg; 0: those of the launch
};

// Four warps at the same wgmma.
struct GroupMeeting {
  const char* instruction = nullptr;
  int here = 0;
  std::array<void*, 4 * kLanes> payload;
};

struct MBarrier {
  uint32_t count = 0, pending = 0;
  uint64_t phase = 0;
  int64_t bytes = 0;             // that copies still have to bring in this phase
  int initialised_by = 0;
  bool seen_by_copies = false;   // a fence followed the initialisation
  std::vector<Thread*> waiting;
  Clock arrived, released;
};

// A copy by cp.async.bulk.tensor on its way.
struct TensorCopy {
  uint32_t to, barrier, bytes;
  TensorMap map;
  std::array<int, 4> at;
  int thread;
  uint32_t step;  // of that thread when it began
  Clock clock;
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
  std::vector<GroupMeeting> groups;
  std::map<uint32_t, MBarrier> mbarriers;  // by their offset in shared memory
  std::vector<TensorCopy> copies;
};

extern Block block;
extern Thread* current;  // null outside of a kernel

// Ends the launch with an error of the current thread; does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

uint64_t random_below(uint64_t n);

// The current thread stops until wake(), or lets others go first.
void wait(const char* what);
void wake(Thread* thread);
void let_others_run();

// ---- shared_memory.cpp ----

void reset_shared_memory(size_t bytes);
// kTensorRead and kTensorCopyStarts: through the asynchronous proxy, by wgmma and by tensor copies. kTensorCheck: what is
// to be read must be there already.
enum class Access { kRead, kWrite, kCopyStarts, kTensorRead, kTensorCheck, kTensorCopyStarts };
// The current thread reads or writes shared memory: must be in bounds, ordered, and initialised if read.
void touch_shared(const void* p, size_t bytes, Access access, const char* what);
void check_global(const void* p, size_t bytes, const char* what);
// Error if this byte was written later than `known` tells.
void check_unchanged(uint32_t offset, const Clock& known);
// 16 bytes of a tensor copy are there; error if something else was written since it began.
void copied_bytes_arrive(uint32_t offset, const TensorCopy& copy);

// ---- clocks ----

void join(Clock& into, const Clock& from);
// The thread learns what `known` knows, but its own steps stay its own.
void learn(Thread& thread, const Clock& known);
// The current thread tells `known` what it did until now.
void tell(Clock& known);
// All these threads know what each of them did.
void synchronise(const std::vector<Thread*>& threads);

// ---- warps ----

// The lanes of mask come here, each with a payload; the last one runs action(payloads by lane); then all go on.
void meet(const char* instruction, uint32_t mask, void* payload,
          const std::function<void(const std::array<void*, kLanes>&)>& action);

// ---- async_copies.cpp, warpgroup.cpp ----

void start_copies();        // of a new block: draws how late they arrive
bool copy_may_arrive();     // by chance
void let_a_copy_arrive();
const char* left_over();    // what is unfinished at the end of a block, null if nothing
float number(Element element, uint32_t word, int i);  // of a word of an operand
float cut(double x);

}  // namespace hierkernels::emulation

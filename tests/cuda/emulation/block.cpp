// Scheduling: blocks one after the other, their threads as fibers in an order that the seed decides.
#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>

namespace hierkernels::emulation {

Block block;
Thread* current = nullptr;

namespace {

Fiber host;
Kernel kernel_of_launch;
std::string error;
uint64_t random_state = 1;

// Which warps go first: a favourite order, drawn anew with probability 1 / period at each step. Long periods let
// one warp run far ahead of the others, short ones mix them.
std::vector<int> warp_order;
uint64_t period = 1;

void shuffle_warps() {
  for (size_t i = warp_order.size(); i > 1; --i) std::swap(warp_order[i - 1], warp_order[random_below(i)]);
}

Thread* pick_ready() {
  if (random_below(period) == 0) shuffle_warps();
  for (const int w : warp_order) {
    std::vector<Thread*>& ready = block.warps[w].ready;
    if (ready.empty()) continue;
    std::swap(ready[random_below(ready.size())], ready.back());
    Thread* thread = ready.back();
    ready.pop_back();
    return thread;
  }
  return nullptr;
}

bool all_done() {
  for (const Thread& t : block.threads)
    if (t.state != Thread::kDone) return false;
  return true;
}

// Tensor copies arrive by chance, or when nothing else can happen: as late as they may.
Thread* next_ready() {
  while (error.empty()) {
    if (!block.copies.empty() && copy_may_arrive()) let_a_copy_arrive();
    if (Thread* thread = pick_ready()) return thread;
    if (block.copies.empty() || all_done()) return nullptr;
    let_a_copy_arrive();
  }
  return nullptr;
}

// Leaves the current thread for another one, or for the host when no thread is ready.
void switch_away() {
  Thread* from = current;
  Thread* to = next_ready();
  ++counts().switches;
  if (to == from) return;
  current = to;
  switch_fiber(from->fiber, to ? to->fiber : host);
}

}  // namespace

void wake(Thread* thread) {
  thread->state = Thread::kReady;
  block.warps[thread->warp].ready.push_back(thread);
}

void wait(const char* what) {
  current->state = Thread::kWaiting;
  current->waits_for = what;
  switch_away();
}

void let_others_run() {
  wake(current);
  switch_away();
}

namespace {

void thread_main() {
  kernel_of_launch.call(kernel_of_launch);
  if (!current->open.empty() || !current->groups.empty()) fail("thread ends with cp.async not waited for");
  current->state = Thread::kDone;
  switch_away();
}

std::string name_of(const Thread& thread) {
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), thread %d", block.index.x, block.index.y, block.index.z,
                thread.number);
  return text;
}

std::string deadlock() {
  std::map<std::string, std::vector<const Thread*>> groups;
  for (const Thread& t : block.threads) groups[t.state == Thread::kDone ? "ended" : t.waits_for].push_back(&t);
  std::string text = "deadlock in " + name_of(block.threads[0]) + " and others:";
  for (const auto& [what, threads] : groups)
    text += " [" + what + ": " + std::to_string(threads.size()) + ", first " + std::to_string(threads[0]->number) + "]";
  return text;
}

void start_threads(int n) {
  static std::vector<Fiber> fibers(kMaxThreads);  // keep their stacks from block to block
  block.threads.resize(n);
  block.warps.assign((n + kLanes - 1) / kLanes, Warp());
  block.barriers.fill(Barrier());
  block.groups.assign((n + 4 * kLanes - 1) / (4 * kLanes), GroupMeeting());
  block.mbarriers.clear();
  start_copies();
  for (int i = 0; i < n; ++i) {
    Thread& t = block.threads[i];
    t.number = i;
    t.lane = i % kLanes;
    t.warp = i / kLanes;
    t.index = {i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y)};
    t.state = Thread::kReady;
    t.open.clear();
    t.groups.clear();
    t.proxy_fences = 0;
    if (options().races) {
      t.clock.assign(n, 0);
      t.clock[i] = 1;
    }
    prepare(fibers[i], thread_main);
    t.fiber = fibers[i];
    block.warps[t.warp].ready.push_back(&t);
  }
  warp_order.resize(block.warps.size());
  for (size_t w = 0; w < warp_order.size(); ++w) warp_order[w] = static_cast<int>(w);
  shuffle_warps();
  constexpr uint64_t kPeriods[] = {1, 16, 256, 1u << 20};
  period = kPeriods[random_below(4)];
}

void run_block() {
  start_threads(static_cast<int>(block.size.x * block.size.y * block.size.z));
  current = next_ready();
  switch_fiber(host, current->fiber);
  current = nullptr;
  ++counts().blocks;
  if (!error.empty()) return;
  for (const Thread& t : block.threads)
    if (t.state != Thread::kDone) error = deadlock();
  for (const Barrier& b : block.barriers)
    if (error.empty() && b.arrived) error = "a barrier is left with " + std::to_string(b.arrived) + " arrivals";
  if (const char* what = left_over(); what && error.empty()) error = name_of(block.threads[0]) + ": " + what;
}

}  // namespace

Options& options() {
  static Options instance;
  return instance;
}
Counts& counts() {
  static Counts instance;
  return instance;
}

uint64_t random_below(uint64_t n) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545F4914F6CDD1Dull >> 32) % n;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error = (current ? name_of(*current) + ": " : std::string()) + text;
  if (!current) throw std::runtime_error(error);
  Thread* from = current;  // the fibers of the block are abandoned
  current = nullptr;
  switch_fiber(from->fiber, host);
  __builtin_unreachable();
}

void run(const Kernel& kernel, Index grid, Index size, size_t shared_bytes) {
  if (size.x * size.y * size.z > kMaxThreads) throw std::runtime_error(std::string(kernel.name) + ": too many threads");
  if (shared_bytes > kMaxShared) throw std::runtime_error(std::string(kernel.name) + ": too much shared memory");
  kernel_of_launch = kernel;
  error.clear();
  random_state = options().seed * 0x9E3779B97F4A7C15ull + 1;
  block.size = size;
  block.grid = grid;
  std::vector<Index> blocks;  // in any order
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_below(i)]);
  for (const Index& index : blocks) {
    block.index = index;
    reset_shared_memory(shared_bytes);
    run_block();
    if (!error.empty()) throw std::runtime_error(std::string(kernel.name) + ", " + error);
  }
}

Index thread_index() { return current->index; }
Index block_index() { return block.index; }
Index block_size() { return block.size; }
Index grid_size() { return block.grid; }
int lane() { return current->lane; }

// ---- clocks ----

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void learn(Thread& thread, const Clock& known) {
  if (!options().races) return;
  const uint32_t own = thread.clock[thread.number];
  join(thread.clock, known);
  thread.clock[thread.number] = own;
}

void tell(Clock& known) {
  if (!options().races) return;
  join(known, current->clock);
  ++current->clock[current->number];
}

void synchronise(const std::vector<Thread*>& threads) {
  if (!options().races) return;
  Clock all;
  for (const Thread* t : threads) join(all, t->clock);
  for (Thread* t : threads) {
    t->clock = all;
    ++t->clock[t->number];
  }
}

// ---- barriers ----

void barrier(int id, int threads, bool wait_for_all) {
  static const char* const kNames[] = {"__syncthreads", "barrier 1",  "barrier 2",  "barrier 3", "barrier 4",  "barrier 5",
                                       "barrier 6",     "barrier 7",  "barrier 8",  "barrier 9", "barrier 10", "barrier 11",
                                       "barrier 12",    "barrier 13", "barrier 14", "barrier 15"};
  if (id < 0 || id > 15) fail("barrier %d: there are 16", id);
  const char* name = kNames[id];
  if (threads == 0) threads = static_cast<int>(block.threads.size());
  if (threads % kLanes && threads != static_cast<int>(block.threads.size()))
    fail("%s: %d threads, not a multiple of 32", name, threads);
  Barrier& b = block.barriers[id];
  if (b.arrived && b.needed != threads) fail("%s: %d threads here, %d elsewhere", name, threads, b.needed);
  if (std::find(b.all.begin(), b.all.end(), current) != b.all.end()) fail("%s: comes twice", name);
  b.needed = threads;
  ++b.arrived;
  b.all.push_back(current);
  tell(b.clock);
  if (wait_for_all) b.waiting.push_back(current);
  if (b.arrived < b.needed) {
    if (wait_for_all) wait(name);
    return;
  }
  const Barrier complete = std::move(b);
  b = Barrier();
  for (Thread* t : complete.waiting) {
    learn(*t, complete.clock);
    if (t != current) wake(t);
  }
  let_others_run();
}

// ---- warps ----

void meet(const char* instruction, uint32_t mask, void* payload,
          const std::function<void(const std::array<void*, kLanes>&)>& action) {
  const uint32_t own = 1u << current->lane;
  if (!(mask & own)) fail("%s: the lane is not in the mask %08x", instruction, mask);
  Meeting* meeting = nullptr;
  for (Meeting& m : block.warps[current->warp].meetings) {
    if (!m.instruction) {
      if (!meeting) meeting = &m;
    } else if (m.mask == mask) {
      if (std::strcmp(m.instruction, instruction) != 0)
        fail("divergence: %s here, %s in another lane", instruction, m.instruction);
      meeting = &m;
      break;
    }
  }
  if (!meeting) fail("%s: too many masks in use", instruction);
  meeting->instruction = instruction;
  meeting->mask = mask;
  meeting->here |= own;
  meeting->payload[current->lane] = payload;
  if (meeting->here != mask) return wait(instruction);
  const Meeting complete = *meeting;
  *meeting = Meeting();
  action(complete.payload);
  for (int l = 0; l < kLanes; ++l)
    if ((mask >> l & 1) && l != current->lane) wake(&block.threads[current->warp * kLanes + l]);
  let_others_run();
}

void sync_warp(uint32_t mask) {
  meet("__syncwarp", mask, nullptr, [mask](const auto&) {
    std::vector<Thread*> lanes;
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) lanes.push_back(&block.threads[current->warp * kLanes + l]);
    synchronise(lanes);
  });
}

uint64_t shuffle(uint32_t mask, uint64_t value, int from_lane) {
  struct Payload {
    uint64_t value;
    int from;
    uint64_t result;
  } own{value, from_lane, 0};
  meet("shuffle", mask, &own, [mask](const auto& payloads) {
    for (int l = 0; l < kLanes; ++l) {
      if (!(mask >> l & 1)) continue;
      Payload* p = static_cast<Payload*>(payloads[l]);
      if (!(mask >> p->from & 1)) fail("shuffle from lane %d, which is not in the mask %08x", p->from, mask);
      p->result = static_cast<Payload*>(payloads[p->from])->value;
    }
  });
  return own.result;
}

uint32_t ballot(uint32_t mask, bool vote) {
  struct Payload {
    bool vote;
    uint32_t result;
  } own{vote, 0};
  meet("vote", mask, &own, [mask](const auto& payloads) {
    uint32_t votes = 0;
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) votes |= static_cast<uint32_t>(static_cast<Payload*>(payloads[l])->vote) << l;
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) static_cast<Payload*>(payloads[l])->result = votes;
  });
  return own.result;
}

}  // namespace hierkernels::emulation

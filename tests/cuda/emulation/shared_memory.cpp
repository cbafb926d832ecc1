// Shared memory: poisoned, bounds-checked, with a detector of races; and the bounds of global memory.
//
// Kernel files are compiled with -fsanitize=thread, whose hooks (below, in place of the sanitiser's own library)
// tell of every load and store.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "block.h"

namespace hierkernels::emulation {
namespace {

constexpr size_t kArenaBytes = 256 * 1024;
constexpr size_t kMargin = 64 * 1024;  // on both sides, so that overruns are seen as such
constexpr size_t kLimit = 227 * 1024;  // of a block on sm_90
alignas(1024) unsigned char arena[kMargin + kArenaBytes + kMargin];
unsigned char* const base = arena + kMargin;
size_t shared_bytes = 0;

// What is known of two bytes of shared memory (the smallest element that kernels store).
struct Cell {
  static constexpr int kReaders = 12;
  uint32_t launch = 0;   // of what block this is; older cells count as fresh
  int16_t writer = -1;   // -1: never written
  int16_t readers = 0;
  bool on_its_way = false;  // a copy has not arrived yet
  bool generic = false;     // written by an ordinary store: wgmma and tensor copies need a fence to see it
  uint32_t fences = 0;      // that the writer had made before
  uint32_t write_step = 0;
  int16_t reader[kReaders];
  uint32_t read_step[kReaders];
};
std::vector<Cell> cells(kArenaBytes / 2);
uint32_t launch = 0;

struct Range {
  const unsigned char *begin, *end;
};
std::vector<Range> allowed;

bool in_arena(const void* p) { return p >= arena && p < arena + sizeof arena; }

void write_cell(Cell& c, const Thread& t, size_t at, Access access, const char* what) {
  for (int i = 0; i < c.readers; ++i)
    if (c.reader[i] != t.number && t.clock[c.reader[i]] < c.read_step[i])
      fail("race: %s writes shared byte %zu, which thread %d reads at the same time", what, at, c.reader[i]);
  c.readers = 0;
  c.writer = static_cast<int16_t>(t.number);
  c.write_step = t.clock[t.number];
  c.on_its_way = access == Access::kCopyStarts || access == Access::kTensorCopyStarts;
  c.generic = access != Access::kTensorCopyStarts;
  c.fences = t.proxy_fences;
}

void read_cell(Cell& c, const Thread& t) {
  int kept = 0;
  for (int i = 0; i < c.readers; ++i) {  // readers that this one follows are covered by it
    if (t.clock[c.reader[i]] >= c.read_step[i]) continue;
    c.reader[kept] = c.reader[i];
    c.read_step[kept++] = c.read_step[i];
  }
  if (kept == Cell::kReaders) --kept;  // forgets one: a race may be missed, none is invented
  c.reader[kept] = static_cast<int16_t>(t.number);
  c.read_step[kept++] = t.clock[t.number];
  c.readers = static_cast<int16_t>(kept);
}

}  // namespace

unsigned char* shared_memory() { return base; }

uint32_t shared_offset(const void* p) {
  if (!in_arena(p)) fail("not an address in shared memory: %p", p);
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - base);
}

void reset_shared_memory(size_t bytes) {
  if (bytes > kLimit) fail("%zu bytes of shared memory, at most %zu are there", bytes, kLimit);
  std::memset(base, 0xff, std::max(bytes, shared_bytes));
  shared_bytes = bytes;
  ++launch;
}

void touch_shared(const void* p, size_t bytes, Access access, const char* what) {
  const unsigned char* first = static_cast<const unsigned char*>(p);
  if (first < base || first + bytes > base + shared_bytes)
    fail("%s out of bounds: byte %td of %zu in shared memory", what, first - base, shared_bytes);
  if (!options().races) return;
  const size_t at = static_cast<size_t>(first - base);
  for (size_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Cell& c = cells[i];
    if (c.launch != launch) c = Cell{.launch = launch};
    const bool by_tensor = access == Access::kTensorRead || access == Access::kTensorCheck;
    const bool reads = by_tensor || access == Access::kRead;
    if (c.writer < 0 && reads) fail("%s reads shared byte %zu, which nothing wrote", what, 2 * i);
    if (c.writer >= 0 && c.writer != current->number && current->clock[c.writer] < c.write_step)
      fail("race: %s %s shared byte %zu, which thread %d writes at the same time", what,
           reads ? "reads" : "writes", 2 * i, c.writer);
    if (by_tensor && c.generic && block.threads[c.writer].proxy_fences == c.fences)
      fail("%s reads shared byte %zu, which thread %d stored without fence.proxy.async", what, 2 * i, c.writer);
    if (reads && c.on_its_way)
      fail("race: %s reads shared byte %zu, where a copy has not been waited for", what, 2 * i);
    if (access == Access::kTensorCheck) continue;
    if (reads)
      read_cell(c, *current);
    else
      write_cell(c, *current, 2 * i, access, what);
  }
}

void check_unchanged(uint32_t offset, const Clock& known) {
  if (!options().races) return;
  const Cell& c = cells[offset / 2];
  if (c.writer >= 0 && known[c.writer] < c.write_step)
    fail("race: shared byte %u was written again while a wgmma that reads it ran", offset);
}

void copied_bytes_arrive(uint32_t offset, const TensorCopy& copy) {
  if (!options().races) return;
  for (size_t i = offset / 2; i < offset / 2 + 8; ++i) {
    Cell& c = cells[i];
    if (c.writer != copy.thread || c.write_step != copy.step)
      fail("race: shared byte %zu is written while a tensor copy of thread %d is on its way there", 2 * i, copy.thread);
    c.on_its_way = false;
  }
}

void allow(const void* begin, size_t bytes) {
  const unsigned char* p = static_cast<const unsigned char*>(begin);
  allowed.push_back({p, p + bytes});
}
void forbid_all() { allowed.clear(); }

extern "C" char __ehdr_start, _end;  // of this library: its constants may be read

void check_global(const void* p, size_t bytes, const char* what) {
  if (!options().bounds) return;
  const unsigned char* first = static_cast<const unsigned char*>(p);
  const unsigned char* stack = current->fiber.stack;
  if (first >= stack && first < stack + kStackBytes) return;
  for (size_t i = allowed.size(); i-- > 0;)
    if (first >= allowed[i].begin && first + bytes <= allowed[i].end) return;
  const unsigned char* image = reinterpret_cast<const unsigned char*>(&__ehdr_start);
  if (first >= image && first < reinterpret_cast<const unsigned char*>(&_end)) return;
  fail("%s of %zu bytes of global memory at %p: in no tensor of the call", what, bytes, p);
}

namespace {
inline void seen(void* p, size_t bytes, Access access) {
  if (!current) return;
  const char* what = access == Access::kRead ? "load" : "store";
  if (in_arena(p))
    touch_shared(p, bytes, access, what);
  else
    check_global(p, bytes, what);
}
}  // namespace

}  // namespace hierkernels::emulation

using hierkernels::emulation::Access;
using hierkernels::emulation::seen;

#define HOOK __attribute__((visibility("hidden"))) void
#define HOOKS(n)                                                       \
  HOOK __tsan_read##n(void* p) { seen(p, n, Access::kRead); }          \
  HOOK __tsan_write##n(void* p) { seen(p, n, Access::kWrite); }        \
  HOOK __tsan_unaligned_read##n(void* p) { seen(p, n, Access::kRead); } \
  HOOK __tsan_unaligned_write##n(void* p) { seen(p, n, Access::kWrite); }
extern "C" {
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* p, size_t n) { seen(p, n, Access::kRead); }
HOOK __tsan_write_range(void* p, size_t n) { seen(p, n, Access::kWrite); }
HOOK __tsan_vptr_update(void*, void*) {}
HOOK __tsan_vptr_read(void*) {}
__attribute__((visibility("hidden"))) unsigned char __tsan_atomic8_load(const unsigned char* p, int) { return *p; }
}

// mbarriers and tensor copies: meaning as in the PTX ISA, mbarrier and cp.async.bulk.tensor.
#include <cstring>

#include "block.h"

namespace hierkernels::emulation {
namespace {

constexpr uint32_t kMaxPendingBytes = (1u << 20) - 1;
constexpr int kSMRegisters = 64 * 1024, kGroupWarps = 4;
uint64_t copy_period = 1;

MBarrier& mbarrier(const void* p, const char* what) {
  const auto found = block.mbarriers.find(shared_offset(p));
  if (found == block.mbarriers.end()) fail("%s: the mbarrier was never initialised", what);
  touch_shared(p, 8, Access::kRead, what);  // its initialisation must have been seen
  return found->second;
}

void end_phase_if_complete(MBarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.count;
  b.released = b.arrived;
  for (Thread* t : b.waiting) wake(t);
  b.waiting.clear();
}

// 128-byte swizzle: the place of 16 bytes in 128 is changed by the 8 rows of 128 that they lie in.
uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// For each 16 bytes of a copy: their offset in shared memory, and where they come from, null if that is out of range.
template <class Visit>
void each_chunk(const TensorMap& map, uint32_t to, const std::array<int, 4>& at, Visit visit) {
  const uint32_t rows = map.box[1] * map.box[2] * map.box[3];
  for (uint32_t row = 0; row < rows; ++row) {
    const int64_t place[4] = {0, at[1] + static_cast<int64_t>(row % map.box[1]),
                              at[2] + static_cast<int64_t>(row / map.box[1] % map.box[2]),
                              at[3] + static_cast<int64_t>(row / map.box[1] / map.box[2])};
    const unsigned char* source = map.data;
    bool inside = true;
    for (int d = 1; d < 4; ++d) {
      inside &= place[d] >= 0 && place[d] < static_cast<int64_t>(map.size[d]);
      source += place[d] * static_cast<int64_t>(map.stride[d]);
    }
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      const int64_t column = at[0] + static_cast<int64_t>(chunk) * 8;
      int64_t first = column < 0 ? -column : 0, last = static_cast<int64_t>(map.size[0]) - column;  // that are there
      if (last > 8) last = 8;
      if (!inside || first >= last) first = last = 0;
      visit(swizzled(to + row * 128 + chunk * 16), source + column * 2, static_cast<int>(first), static_cast<int>(last));
    }
  }
}

}  // namespace

void start_copies() {
  block.copies.clear();
  constexpr uint64_t kPeriods[] = {1, 4096, 1u << 20};
  copy_period = kPeriods[random_below(3)];
}
bool copy_may_arrive() { return random_below(copy_period) == 0; }

void mbarrier_init(const void* p, int count) {
  if (shared_offset(p) % 8) fail("mbarrier.init: an address that is not a multiple of 8");
  if (count < 1 || count >= 1 << 20) fail("mbarrier.init: %d arrivals", count);
  touch_shared(p, 8, Access::kWrite, "mbarrier.init");
  MBarrier b;
  b.count = b.pending = static_cast<uint32_t>(count);
  b.initialised_by = current->number;
  block.mbarriers[shared_offset(p)] = b;
}

void mbarrier_arrive(const void* p, uint32_t expected_bytes) {
  MBarrier& b = mbarrier(p, "mbarrier.arrive");
  if (b.pending == 0) fail("mbarrier.arrive: more than the %u arrivals of a phase", b.count);
  b.bytes += expected_bytes;
  if (b.bytes > kMaxPendingBytes) fail("mbarrier.arrive.expect_tx: %lld bytes", static_cast<long long>(b.bytes));
  tell(b.arrived);
  --b.pending;
  end_phase_if_complete(b);
  let_others_run();
}

bool mbarrier_try_wait(const void* p, uint32_t parity) {
  MBarrier& b = mbarrier(p, "mbarrier.try_wait");
  if ((b.phase & 1) == parity) {  // the phase of that parity is the present one
    b.waiting.push_back(current);
    wait("mbarrier");
    return false;
  }
  learn(*current, b.released);
  return true;
}

void fence_mbarrier_init() {
  for (auto& [offset, b] : block.mbarriers) b.seen_by_copies |= b.initialised_by == current->number;
}

void fence_proxy_async() {
  ++current->proxy_fences;
  fence_mbarrier_init();
}

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg: %d registers", count);
  meet("setmaxnreg", ~0u, nullptr, [count](const auto&) { block.warps[current->warp].registers = count; });
}

// What is wrong with the registers that the warps have in the end. A launch gives each thread as many as there are for
// one block on a multiprocessor, a multiple of 8.
static const char* wrong_registers() {
  const int warps = static_cast<int>(block.warps.size());
  const int of_launch = kSMRegisters / (warps * kLanes) / 8 * 8;
  int total = 0, changed = 0;
  for (int w = 0; w < warps; ++w) {
    const int own = block.warps[w].registers;
    changed += own != 0;
    total += kLanes * (own ? own : of_launch);
    if (own != block.warps[w / kGroupWarps * kGroupWarps].registers)
      return "setmaxnreg: not the same in all warps of a warpgroup";
  }
  if (changed && total > kSMRegisters) return "setmaxnreg: more registers than there are: the taking would wait for ever";
  return nullptr;
}

void tensor_copy(void* to, const TensorMap& map, const void* barrier, int rank, const int (&at)[4]) {
  if (rank != map.rank) fail("cp.async.bulk.tensor: %d coordinates for a tensor map of %d dimensions", rank, map.rank);
  if (shared_offset(to) % 128) fail("cp.async.bulk.tensor: an address that is not a multiple of 128");
  if (!mbarrier(barrier, "cp.async.bulk.tensor").seen_by_copies)
    fail("cp.async.bulk.tensor: no fence.mbarrier_init after the initialisation of its mbarrier");
  const uint32_t rows = map.box[1] * map.box[2] * map.box[3];
  TensorCopy copy{shared_offset(to), shared_offset(barrier), rows * 128, map, {at[0], at[1], at[2], at[3]},
                  current->number, options().races ? current->clock[current->number] : 0, current->clock};
  each_chunk(map, copy.to, copy.at, [&](uint32_t offset, const unsigned char* from, int first, int last) {
    unsigned char* p = shared_memory() + offset;
    touch_shared(p, 16, Access::kTensorCopyStarts, "cp.async.bulk.tensor");
    if (first < last) check_global(from + 2 * first, 2 * (last - first), "cp.async.bulk.tensor");
    std::memset(p, 0xff, 16);  // NaN until it arrives
  });
  if (options().races) ++current->clock[current->number];
  block.copies.push_back(copy);
  ++counts().tensor_copies;
}

void let_a_copy_arrive() {
  const size_t i = random_below(block.copies.size());
  const TensorCopy copy = block.copies[i];
  block.copies.erase(block.copies.begin() + static_cast<std::ptrdiff_t>(i));
  each_chunk(copy.map, copy.to, copy.at, [&](uint32_t offset, const unsigned char* from, int first, int last) {
    copied_bytes_arrive(offset, copy);
    unsigned char* p = shared_memory() + offset;
    std::memset(p, 0, 16);
    if (first < last) std::memcpy(p + 2 * first, from + 2 * first, 2 * (last - first));
  });
  MBarrier& b = block.mbarriers.at(copy.barrier);
  b.bytes -= copy.bytes;
  if (options().races) join(b.arrived, copy.clock);
  end_phase_if_complete(b);
}

const char* left_over() {
  if (const char* what = wrong_registers()) return what;
  if (!block.copies.empty()) return "the block ends with a tensor copy on its way";
  for (const Warp& w : block.warps)
    if (!w.products.empty() || !w.committed.empty()) return "the block ends with a wgmma not waited for";
  for (const auto& [offset, b] : block.mbarriers)
    if (b.pending != b.count || b.bytes) return "an mbarrier is left in the middle of a phase";
  return nullptr;
}

}  // namespace hierkernels::emulation

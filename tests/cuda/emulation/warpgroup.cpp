// wgmma: products of a warpgroup, from descriptors of shared memory. They take place when they are waited for, as late
// as they may; until then the registers of their sums hold NaN, and those of their operand must not change.
#include <cstring>

#include "block.h"

namespace hierkernels::emulation {
namespace {

constexpr int kGroup = 4 * kLanes, kDepth = 16, kRows = 16;  // threads; columns of A; a warp's rows of A
constexpr uint32_t kPoison = 0xffffffffu;

// Offset of the element (mn, k) of an operand in shared memory (PTX ISA, wgmma, matrix descriptor and canonical
// layouts), swizzled by 128 bytes. Rows along k: of 128 bytes, 8 of them `stride` apart. Rows along mn ("transposed"):
// 64 mn in 128 bytes, 8 k in 1024; the next 8 k are `stride` apart, the next 64 mn `leading`.
uint32_t element_offset(uint64_t descriptor, int mn, int k, bool transposed) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t at = transposed ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                 : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  const int swizzle = static_cast<int>(descriptor >> 62);  // 0: none, 1, 2, 3: of 128, 64, 32 bytes
  if (swizzle == 0) return at;
  return at ^ (at >> 7 & (7u >> (swizzle - 1))) << 4;
}

void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 49 & 7 || (descriptor & 0x3fff) << 4 & 0x380)
    fail("wgmma: only tiles that begin at multiples of 1024 bytes (base offset 0) are emulated");
}

float shared_number(Element element, uint32_t offset, Access access, const Clock* begun) {
  const unsigned char* p = shared_memory() + offset;
  touch_shared(p, 2, access, "wgmma");
  if (begun) check_unchanged(offset, *begun);
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return number(element, bits, 0);
}

bool same_sums(const Product& a, const Product& b) { return a.d[0] == b.d[0]; }

void save_sums(Product& p) {
  p.follows = false;
  p.sums.resize(static_cast<size_t>(kLanes) * p.n / 2);
  for (int l = 0; l < kLanes; ++l) {
    std::memcpy(&p.sums[static_cast<size_t>(l) * p.n / 2], p.d[l], p.n / 2 * sizeof(float));
    std::memset(p.d[l], 0xff, p.n / 2 * sizeof(float));
  }
}

void check_registers(const Product& p) {
  for (int l = 0; l < kLanes; ++l) {
    if (p.a_in_registers && std::memcmp(p.a_words[l].data(), p.a_words_at[l], 16) != 0)
      fail("wgmma: the registers of its operand changed before the wait");
    for (int i = 0; i < p.n / 2 && !p.follows; ++i) {
      uint32_t word;
      std::memcpy(&word, p.d[l] + i, 4);
      if (word != kPoison) fail("wgmma: the registers of its sums changed before the wait");
    }
  }
}

// The rows 16 warp to 16 warp + 15 of a product.
void compute(const Product& p, int warp) {
  check_registers(p);
  static float a[kRows][kDepth], b[kDepth][256];
  for (int k = 0; k < kDepth; ++k) {
    for (int r = 0; r < kRows; ++r)
      a[r][k] = p.a_in_registers ? number(p.element, p.a_words[r % 8 * 4 + k % 8 / 2][r / 8 + k / 8 * 2], k & 1)
                                 : shared_number(p.element, element_offset(p.a, warp * kRows + r, k, false),
                                                 Access::kTensorRead, &p.begun);
    for (int n = 0; n < p.n; ++n)
      b[k][n] = shared_number(p.element, element_offset(p.b, n, k, p.b_transposed), Access::kTensorRead, &p.begun);
  }
  for (int r = 0; r < kRows; ++r) {
    double sums[256];
    for (int n = 0; n < p.n; ++n) {
      const int lane = r % 8 * 4 + n % 8 / 2, at = n / 8 * 4 + r / 8 * 2 + (n & 1);
      sums[n] = !p.accumulate ? 0.0 : p.follows ? p.d[lane][at] : p.sums[static_cast<size_t>(lane) * p.n / 2 + at];
    }
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < p.n; ++n) sums[n] += static_cast<double>(a[r][k]) * b[k][n];
    for (int n = 0; n < p.n; ++n)
      p.d[r % 8 * 4 + n % 8 / 2][n / 8 * 4 + r / 8 * 2 + (n & 1)] = cut(sums[n]);
  }
}

// Products that wait for one that is done take over its sums.
void release_followers(Warp& w) {
  std::vector<Product*> pending;
  for (std::vector<Product>& group : w.committed)
    for (Product& p : group) pending.push_back(&p);
  for (Product& p : w.products) pending.push_back(&p);
  for (size_t i = 0; i < pending.size(); ++i) {
    bool first = pending[i]->follows;
    for (size_t j = 0; j < i; ++j) first &= !same_sums(*pending[i], *pending[j]);
    if (first) save_sums(*pending[i]);
  }
}

struct Payload {
  float* d;
  const uint32_t* a_words;
  uint64_t a, b;
  bool accumulate;
};

// What the whole group reads must be there when the product begins, too.
void check_operands(const Product& p) {
  for (int k = 0; k < kDepth; ++k) {
    for (int r = 0; r < 4 * kRows && !p.a_in_registers; ++r)
      shared_number(p.element, element_offset(p.a, r, k, false), Access::kTensorCheck, nullptr);
    for (int n = 0; n < p.n; ++n)
      shared_number(p.element, element_offset(p.b, n, k, p.b_transposed), Access::kTensorCheck, nullptr);
  }
}

void begin_product(const Product& common, const GroupMeeting& meeting, int first_warp) {
  for (int w = 0; w < 4; ++w) {
    Product p = common;
    for (int l = 0; l < kLanes; ++l) {
      const Payload& from = *static_cast<const Payload*>(meeting.payload[w * kLanes + l]);
      if (from.a != p.a || from.b != p.b || from.accumulate != p.accumulate)
        fail("wgmma: the threads of a warpgroup differ in a descriptor or in whether to accumulate");
      p.d[l] = from.d;
      p.a_words_at[l] = from.a_words;
      if (p.a_in_registers) std::memcpy(p.a_words[l].data(), from.a_words, 16);
    }
    Warp& warp = block.warps[first_warp + w];
    p.follows = false;
    for (const std::vector<Product>& group : warp.committed)
      for (const Product& earlier : group) p.follows |= same_sums(p, earlier);
    for (const Product& earlier : warp.products) p.follows |= same_sums(p, earlier);
    if (!p.follows) save_sums(p);
    warp.products.push_back(std::move(p));
  }
}

}  // namespace

void wgmma(Element element, int n, float* d, const uint32_t* a_words, uint64_t a, uint64_t b, bool accumulate,
           bool b_transposed) {
  if (n < 8 || n > 256 || n % 8) fail("wgmma: %d columns", n);
  if (!block.warps[current->warp].wgmma_fenced) fail("wgmma without a wgmma.fence since the last wait");
  check_descriptor(b);
  if (!a_words) check_descriptor(a);
  Payload own{d, a_words, a, b, accumulate};
  GroupMeeting& meeting = block.groups[current->number / kGroup];
  const char* instruction = a_words ? "wgmma of registers" : "wgmma of shared memory";
  if (meeting.here && std::strcmp(meeting.instruction, instruction) != 0)
    fail("divergence: %s here, %s in another thread", instruction, meeting.instruction);
  meeting.instruction = instruction;
  meeting.payload[current->number % kGroup] = &own;
  if (++meeting.here < kGroup) return wait(instruction);
  const GroupMeeting complete = meeting;
  meeting = GroupMeeting();
  const int first_warp = current->number / kGroup * 4;
  Product common{};
  common.element = element;
  common.n = n;
  common.accumulate = accumulate;
  common.b_transposed = b_transposed;
  common.a_in_registers = a_words != nullptr;
  common.a = a;
  common.b = b;
  if (options().races) {
    check_operands(common);
    common.begun = current->clock;
  }
  begin_product(common, complete, first_warp);
  ++counts().wgmma;
  for (int t = 0; t < kGroup; ++t)
    if (Thread* thread = &block.threads[first_warp * kLanes + t]; thread != current) wake(thread);
  let_others_run();
}

void wgmma_fence() {
  meet("wgmma.fence", ~0u, nullptr, [](const auto&) { block.warps[current->warp].wgmma_fenced = true; });
}

void wgmma_commit() {
  meet("wgmma.commit_group", ~0u, nullptr, [](const auto&) {
    Warp& w = block.warps[current->warp];
    w.committed.emplace_back();
    w.committed.back().swap(w.products);
  });
}

void wgmma_wait(int groups) {
  meet("wgmma.wait_group", ~0u, nullptr, [groups](const auto&) {
    Warp& w = block.warps[current->warp];
    while (static_cast<int>(w.committed.size()) > groups) {
      for (const Product& p : w.committed.front()) compute(p, current->warp % 4);
      w.committed.pop_front();
    }
    release_followers(w);
    w.wgmma_fenced = false;
    if (!options().races) return;
    // All lanes know of the reads, which the detector counts as this lane's.
    for (int l = 0; l < kLanes; ++l) {
      Thread& t = block.threads[current->warp * kLanes + l];
      if (&t != current) t.clock[current->number] = std::max(t.clock[current->number], current->clock[current->number]);
    }
    ++current->clock[current->number];
  });
}

}  // namespace hierkernels::emulation

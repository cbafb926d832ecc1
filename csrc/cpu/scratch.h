// Memory that kernels write: buffers of a thread that are kept between calls, and hints for fresh outputs.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hierkernels {

// What a thread's buffer is for: its own task, what it shares with the workers of the parallel region that it
// starts, and copies of a bias gradient.
enum class ScratchUse : int { kTask, kShared, kBias };

// At least `bytes` of uninitialised memory, 64-byte aligned, on huge pages where the system has them. It belongs to
// the calling thread, stays valid until the thread asks again for the same use, and only grows.
char* thread_scratch(ScratchUse use, size_t bytes);

// Outputs from this size on are written past the caches: they would not stay there.
constexpr size_t kLargeOutput = size_t{4} << 20;

// Asks for huge pages for a large output that is about to be written: it probably comes fresh from the system, and
// faults of 4 KiB would cost more than the kernel.
void advise_huge_pages(void* data, size_t bytes);

// Divides one buffer: sizes first, then addresses.
class ScratchLayout {
 public:
  // The offset of a part of `bytes`; parts do not start at the same place of a 4 KiB page.
  size_t add(size_t bytes) {
    const size_t offset = total_;
    total_ += (bytes + 63) / 64 * 64 + 64 * 3;
    return offset;
  }
  size_t total() const { return total_; }

 private:
  size_t total_ = 0;
};

}  // namespace hierkernels

#include "scratch.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hierkernels {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
      data_ = static_cast<char*>(std::aligned_alloc(kHugePage, size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
#if defined(__linux__)
      madvise(data_, size_, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
// Maps [begin, end), whole pages, unless that of `probe` is mapped: a walk over 500 mapped ones would take 20 us.
void populate(uintptr_t begin, uintptr_t end, uintptr_t probe) {
  unsigned char mapped = 0;
  if (begin >= end || (mincore(reinterpret_cast<void*>(probe), kPage, &mapped) == 0 && (mapped & 1))) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
}
#endif

}  // namespace

char* thread_scratch(ScratchUse use, size_t bytes) {
  static thread_local Buffer buffers[3];
  return buffers[static_cast<int>(use)].get(bytes);
}

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  if (bytes < kLargeOutput) return;
  // Outwards to whole pages: tensors that lie side by side then form one area of the same kind, and no huge page is
  // lost at their borders.
  const auto down = [](uintptr_t x, uintptr_t unit) { return x / unit * unit; };
  const uintptr_t begin = down(reinterpret_cast<uintptr_t>(data), kPage);
  const uintptr_t end = down(reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1, kPage);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  // The ends that do not fill a huge page come in small ones, all in one call: 500 faults would take a thread 1 ms.
  const uintptr_t first = down(begin + kHugePage - 1, kHugePage), last = down(end, kHugePage);
  populate(begin, first, first - kPage);  // the outermost pages may be mapped by a neighbour
  populate(last, end, last);
#endif
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace hierkernels

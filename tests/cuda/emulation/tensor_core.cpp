// Instructions of a whole warp on tiles, and asynchronous copies: layouts and meaning as in the PTX ISA.
#include <cmath>
#include <cstring>

#include "../../../csrc/cuda/common/ptx.h"
#include "block.h"

namespace hierkernels::emulation {

float number(Element element, uint32_t word, int i) {
  if (element == Element::kTf32) {
    if (word & 0x1fff) fail("mma: an operand has more digits than tf32: it needs to_tf32");
    return cuda::__uint_as_float(word);
  }
  const uint16_t bits = static_cast<uint16_t>(i ? word >> 16 : word);
  return element == Element::kBFloat16 ? cuda::ptx::to_float(cuda::BFloat16{bits})
                                       : cuda::ptx::to_float(cuda::Float16{bits});
}

// Tensor cores do not round their sums to the nearest number, they cut digits off: so does this, as the worst case.
float cut(double x) {
  float y = static_cast<float>(x);
  if (std::isfinite(y) && std::fabs(static_cast<double>(y)) > std::fabs(x)) y = std::nextafter(y, 0.f);
  return y;
}

void ldmatrix(uint32_t (&r)[4], bool transposed, const void* row) {
  struct Payload {
    uint32_t* words;
    const unsigned char* row;
  } own{r, static_cast<const unsigned char*>(row)};
  if (shared_offset(row) % 16) fail("ldmatrix: a row at an address that is not a multiple of 16");
  touch_shared(row, 16, Access::kRead, "ldmatrix");
  meet(transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, &own, [transposed](const auto& payloads) {
    ++counts().ldmatrix;
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      unsigned banks = 0;
      bool conflict = false;
      for (int i = 0; i < 8; ++i) {
        const unsigned char* p = static_cast<Payload*>(payloads[8 * m + i])->row;
        std::memcpy(matrix[i], p, 16);
        const unsigned bit = 1u << shared_offset(p) / 16 % 8;
        conflict |= (banks & bit) != 0;
        banks |= bit;
      }
      counts().bank_conflicts += conflict;
      for (int l = 0; l < kLanes; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        const uint32_t low = transposed ? matrix[j][i] : matrix[i][j];
        const uint32_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
        static_cast<Payload*>(payloads[l])->words[m] = low | high << 16;
      }
    }
  });
}

void mma(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Payload {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } own{d, a, {b0, b1}};
  static const char* const kNames[] = {"mma.bf16", "mma.f16", "mma.tf32"};
  meet(kNames[static_cast<int>(element)], ~0u, &own, [element](const auto& payloads) {
    ++counts().mma;
    const int per_word = element == Element::kTf32 ? 1 : 2, depth = 8 * per_word;
    double A[16][16], B[8][16];
    for (int l = 0; l < kLanes; ++l) {
      const Payload* p = static_cast<Payload*>(payloads[l]);
      const int g = l / 4, t = l % 4 * per_word;
      for (int e = 0; e < per_word; ++e) {
        for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t + e + i / 2 * depth / 2] = number(element, p->a[i], e);
        for (int i = 0; i < 2; ++i) B[g][t + e + i * depth / 2] = number(element, p->b[i], e);
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      float* out = static_cast<Payload*>(payloads[l])->d;
      for (int i = 0; i < 4; ++i) {
        const double *x = A[l / 4 + i / 2 * 8], *y = B[l % 4 * 2 + i % 2];
        double sum = out[i];
        for (int k = 0; k < depth; ++k) sum += x[k] * y[k];
        out[i] = cut(sum);
      }
    }
  });
}

void cp_async(void* to, const void* from, int bytes, int source_bytes) {
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async: %d of %d bytes", source_bytes, bytes);
  if (shared_offset(to) % bytes || (source_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async: an address that is not a multiple of %d", bytes);
  touch_shared(to, bytes, Access::kCopyStarts, "cp.async");
  if (source_bytes) check_global(from, source_bytes, "cp.async");
  std::memset(to, 0xff, bytes);  // NaN until it arrives
  current->open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, source_bytes});
}

void cp_async_commit() {
  current->groups.emplace_back();
  current->groups.back().swap(current->open);
}

void cp_async_wait(int groups) {
  while (static_cast<int>(current->groups.size()) > groups) {
    for (const Copy& c : current->groups.front()) {
      touch_shared(c.to, c.bytes, Access::kWrite, "cp.async (arrival)");
      std::memset(c.to, 0, c.bytes);
      std::memcpy(c.to, c.from, c.source_bytes);
    }
    current->groups.pop_front();
  }
}

}  // namespace hierkernels::emulation

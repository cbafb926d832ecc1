// Every PTX instruction that kernels use: inline assembly under nvcc, an emulation under the host's compiler.
//
// Fragments are arrays of 32-bit words, named as in the PTX ISA: lane l is in group g = l / 4 at t = l % 4.
#pragma once
#include "device.h"

#if !defined(__CUDACC__)
#include "ptx_emulation.h"  // the same names, from tests/cuda/emulation
#else
#define PTX __device__ __forceinline__

namespace hierkernels::cuda::ptx {

PTX uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- conversions (PTX ISA 9.7.9.21, cvt) ----

PTX float to_float(float x) { return x; }
PTX float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PTX float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
PTX T from_float(float x);
template <>
PTX float from_float<float>(float x) { return x; }
template <>
PTX BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
PTX Float16 from_float<Float16>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two 16-bit numbers in a word, `low` in the lower half.
template <class T>
PTX uint32_t pack(float low, float high);
template <>
PTX uint32_t pack<BFloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
PTX uint32_t pack<Float16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// The nearest number of 11 significant bits, ties away from zero: an operand of mma_tf32.
PTX uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// ---- elementary functions (9.7.3.21 lg2, 9.7.3.22 ex2, 9.7.3.23 tanh): relative error about 2^-22, ex2(-inf) = 0 ----

PTX float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- tiles between shared memory and registers (9.7.14.5.15, ldmatrix) ----

// Four 8 x 8 matrices of 16-bit (or 8 x 4 of 32-bit) numbers; lane l gives the address of row l % 8 of matrix
// l / 8, aligned to 16 bytes. Word i of a lane is matrix i's row g, numbers 2t and 2t + 1 (or the 32-bit number t).
PTX void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed: word i is rows 2t and 2t + 1 of column g. 16-bit numbers only.
PTX void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- products of a warp (9.7.14.5, mma): d[16 x 8] += a[16 x K] b[K x 8], float32 sums ----
//
// d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
// K = 16, two 16-bit numbers a word:  a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..);
//                                     b: (2t.., g), (2t + 8.., g).
// K = 8, tf32:                        a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b: (t, g), (t + 4, g).

PTX void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PTX void mma(Float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PTX void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- copies from global to shared memory that run on their own (9.7.9.25.3, cp.async) ----

// 16 bytes of which the first `bytes` are read and the rest is zero; both addresses aligned to 16 bytes.
PTX void cp_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the latest kGroups groups of this thread have arrived; a barrier then shows them to the others.
template <int kGroups>
PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- named barriers (9.7.13.1, bar): ids 1 to 15, 0 is __syncthreads; `threads` is a multiple of 32 ----

PTX void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
PTX void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace hierkernels::cuda::ptx
#undef PTX
#endif

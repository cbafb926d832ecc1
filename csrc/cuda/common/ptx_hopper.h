// The PTX instructions of sm_90a: mbarriers, tensor copies (TMA), products of warpgroups (wgmma).
//
// As ptx.h: inline assembly under nvcc, an emulation under the host's compiler. Only sources in csrc/cuda/hopper, which
// are compiled for sm_90a alone, use it.
#pragma once
#include "ptx.h"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace hierkernels::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kSwizzleBytes = 128;  // of a row of a tile; 8 rows make up a pattern, tiles begin at multiples of it
constexpr int kPatternBytes = 8 * kSwizzleBytes;

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = emulation::TensorMap;
#endif

namespace ptx {

// The matrix descriptor (9.7.15.5.1.2.2) of a tile at a shared address, swizzled by 128 bytes. Rows along the sum's
// index: 8 rows are `stride` bytes from the next 8. Rows across it ("transposed"): 8 numbers of the sum's index are
// `stride` from the next 8, 64 of the other index `leading` from the next 64.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int leading, int stride) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | static_cast<uint64_t>(1) << 62;
}

}  // namespace ptx
}  // namespace hierkernels::cuda

#if !defined(__CUDACC__)
#include "ptx_hopper_emulation.h"  // the same names, from tests/cuda/emulation
#else
#define PTX __device__ __forceinline__

namespace hierkernels::cuda::ptx {

// ---- mbarriers (9.7.13.15): a phase ends after `count` arrivals and all bytes that were announced ----

PTX void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
PTX void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
PTX void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Whether the phase of that parity has ended: the first one is 0. May wait for some time.
PTX bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}
PTX void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- fences (9.7.13.4, membar / fence): copies see initialised mbarriers; copies and wgmma see ordinary stores ----

PTX void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor copies (9.7.9.25.5.2, cp.async.bulk.tensor): a box of the map's tensor, zero where that ends ----

// The first coordinate is that of the contiguous dimension. All bytes of the box are reported to the mbarrier.
PTX void tensor_copy(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
PTX void tensor_copy(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
PTX void tensor_copy(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// ---- registers of a warpgroup (9.7.19.5, setmaxnreg): a multiple of 8; all its warps call it ----

template <int kRegisters>
PTX void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
PTX void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup (9.7.15, wgmma): d[64 x N] (+)= a[64 x 16] b[16 x N], float32 sums ----
//
// Warp w of the group holds the rows 16 w + (g, g + 8): d[4 n + 2 half + e] is row g + 8 half, column 8 n + 2 t + e.
// A's words are as those of ptx::mma. From the product to the wait, registers of d and a must be left alone.

// No instruction: these registers are computed before what follows, and read after what went before.
template <int kN>
PTX void settle(float (&r)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int kM, int kN>
PTX void settle(uint32_t (&r)[kM][kN]) {
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j) asm volatile("" : "+r"(r[i][j])::"memory");
}

PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the latest kGroups groups of this warp are done.
template <int kGroups>
PTX void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

#define REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REGISTERS_16(i) REGISTERS_4(i), REGISTERS_4(i + 4), REGISTERS_4(i + 8), REGISTERS_4(i + 12)
#define REGISTERS_32 REGISTERS_16(0), REGISTERS_16(16)
#define REGISTERS_64 REGISTERS_32, REGISTERS_16(32), REGISTERS_16(48)
#define NAMES_32                                                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                  \
  NAMES_32                                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Both operands in shared memory; p is the operand's place that says whether to accumulate.
#define WGMMA_SHARED(n, type, count, a, b, p, transposed)                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NAMES_##count "}, %" #a ", %" #b \
               ", p, 1, 1, 0, %" #transposed ";\n}"                                                                \
               : REGISTERS_##count                                                                                 \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kBTransposed)))
#define WGMMA_REGISTERS(n, type, count, a0, a1, a2, a3, b, p, transposed)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NAMES_##count "}, {%" #a0    \
               ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, %" #transposed ";\n}"                         \
               : REGISTERS_##count                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(static_cast<int>(accumulate)), \
                 "n"(static_cast<int>(kBTransposed)))

// N is 64 or 128. B's descriptor says "transposed" with kBTransposed: its rows lie across the sum's index.
template <bool kBTransposed, int kRegisters>
PTX void wgmma(BFloat16, float (&d)[kRegisters], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64);
  if constexpr (kRegisters == 32)
    WGMMA_SHARED(64, "bf16", 32, 32, 33, 34, 35);
  else
    WGMMA_SHARED(128, "bf16", 64, 64, 65, 66, 67);
}
template <bool kBTransposed, int kRegisters>
PTX void wgmma(Float16, float (&d)[kRegisters], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64);
  if constexpr (kRegisters == 32)
    WGMMA_SHARED(64, "f16", 32, 32, 33, 34, 35);
  else
    WGMMA_SHARED(128, "f16", 64, 64, 65, 66, 67);
}
template <bool kBTransposed, int kRegisters>
PTX void wgmma(BFloat16, float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64);
  if constexpr (kRegisters == 32)
    WGMMA_REGISTERS(64, "bf16", 32, 32, 33, 34, 35, 36, 37, 38);
  else
    WGMMA_REGISTERS(128, "bf16", 64, 64, 65, 66, 67, 68, 69, 70);
}
template <bool kBTransposed, int kRegisters>
PTX void wgmma(Float16, float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64);
  if constexpr (kRegisters == 32)
    WGMMA_REGISTERS(64, "f16", 32, 32, 33, 34, 35, 36, 37, 38);
  else
    WGMMA_REGISTERS(128, "f16", 64, 64, 65, 66, 67, 68, 69, 70);
}

#undef WGMMA_REGISTERS
#undef WGMMA_SHARED
#undef NAMES_64
#undef NAMES_32
#undef REGISTERS_64
#undef REGISTERS_32
#undef REGISTERS_16
#undef REGISTERS_4

}  // namespace hierkernels::cuda::ptx
#undef PTX
#endif

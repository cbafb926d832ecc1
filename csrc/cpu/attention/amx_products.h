// Products of bfloat16 by AMX tiles. Included by *_amx.cpp, before the kernels.
//
// g++ 12's _tile_loadconfig names only part of its operand and _tile_loadd lacks a memory clobber, so that
// stores may move past a load; hence the assembly here.
#pragma once
#include <utility>

#include "bf16_tiles.h"

namespace hierkernels::HK_ISA {
namespace {

// Tiles of 32 rows share their loads of the other operand; strips of 16 were not timed here.
[[maybe_unused]] constexpr bool kNarrowStrips = false;

// ---- tiles ----

struct alignas(64) TileConfig {
  uint8_t bytes[64];
};

// All eight tiles 16 rows of 64 bytes. Once for each thread and parallel region; released at its end.
struct ProductSession {
  ProductSession() {
    TileConfig config{};
    config.bytes[0] = 1;
    for (int t = 0; t < 8; ++t) {
      config.bytes[16 + 2 * t] = 64;
      config.bytes[48 + t] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~ProductSession() { asm volatile("tilerelease" ::: "memory"); }
  ProductSession(const ProductSession&) = delete;
};

template <int T>
HK_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
HK_INLINE void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int T>
HK_INLINE void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
HK_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// ---- products ----

// C (RT x CT tiles) (+)= A (16 RT rows) * B over `count` steps of 32.
// A: rows a_stride bf16 apart, the second row tile a_down on, the next step a_step on.
// B: the second column tile b_right on, the next step b_step on.
// ahead: what a later product reads. Not asked for: that was not measured with tiles.
// begin, end: pairs of terms of the first and the last step outside of which A is 0; tiles take whole steps.
template <int RT, int CT>
HK_INLINE void accumulate(const TileGrid& c, bool first, const bf16* a, int64_t a_stride, int64_t a_down,
                          int64_t a_step, const bf16* b, int64_t b_right, int64_t b_step, int count,
                          const void* ahead = nullptr, int begin = 0, int end = 16) {
  static_assert(RT <= 2 && CT <= 2);
  static_cast<void>(ahead);
  static_cast<void>(begin);
  static_cast<void>(end);
  const int64_t c_bytes = c.stride * 4, a_bytes = a_stride * 2;
  if (first) {
    tile_zero<0>();
    if constexpr (CT > 1) tile_zero<1>();
    if constexpr (RT > 1) tile_zero<2>();
    if constexpr (RT > 1 && CT > 1) tile_zero<3>();
  } else {
    tile_load<0>(c.base, c_bytes);
    if constexpr (CT > 1) tile_load<1>(c.base + c.right, c_bytes);
    if constexpr (RT > 1) tile_load<2>(c.base + c.down, c_bytes);
    if constexpr (RT > 1 && CT > 1) tile_load<3>(c.base + c.down + c.right, c_bytes);
  }
  for (int s = 0; s < count; ++s, a += a_step, b += b_step) {
    tile_load<6>(b, 64);
    tile_load<4>(a, a_bytes);
    tile_dot<0, 4, 6>();
    if constexpr (CT > 1) tile_load<7>(b + b_right, 64), tile_dot<1, 4, 7>();
    if constexpr (RT > 1) tile_load<5>(a + a_down, a_bytes), tile_dot<2, 5, 6>();
    if constexpr (RT > 1 && CT > 1) tile_dot<3, 5, 7>();
  }
  tile_store<0>(c.base, c_bytes);
  if constexpr (CT > 1) tile_store<1>(c.base + c.right, c_bytes);
  if constexpr (RT > 1) tile_store<2>(c.base + c.down, c_bytes);
  if constexpr (RT > 1 && CT > 1) tile_store<3>(c.base + c.down + c.right, c_bytes);
}

// ---- scores: 16 rows x 16 NT keys ----

// Accumulators rotate, and a tile is stored kAcc - 1 steps after its last product: storing a tile that is
// still being computed would block the loads behind it.
template <int KS>
struct ScoreTiles {
  static constexpr int kAcc = KS <= 3 ? 4 : 3;

  template <int N, int Step>
  static HK_INLINE void multiply(const bf16* b) {
    // Two registers for B where they are free.
    constexpr int kB = KS == 1 ? 5 + Step % 3 : KS == 2 ? 6 + Step % 2 : KS == 3 ? 7 : 3;
    tile_load<kB>(b + (N * KS + Step) * kTile, 64);
    tile_dot<N % kAcc, 4 + Step, kB>();
  }
  template <int N, int... Step>
  static HK_INLINE void column(const bf16* b, float* s, int64_t s_bytes, std::integer_sequence<int, Step...>) {
    tile_zero<N % kAcc>();
    (multiply<N, Step>(b), ...);
    if constexpr (N >= kAcc - 1) tile_store<(N + 1) % kAcc>(s + (N - kAcc + 1) * 16, s_bytes);
  }
  template <int N, int NT>
  static HK_INLINE void flush(float* s, int64_t s_bytes) {
    if constexpr (N < NT) {
      if constexpr (N >= 0) tile_store<N % kAcc>(s + N * 16, s_bytes);
      flush<N + 1, NT>(s, s_bytes);
    }
  }
  template <int... N>
  static void run(const bf16* a, int64_t a_bytes, const bf16* b, float* s, int64_t s_bytes,
                  std::integer_sequence<int, N...>) {
    tile_load<4>(a, a_bytes);
    if constexpr (KS > 1) tile_load<5>(a + 32, a_bytes);
    if constexpr (KS > 2) tile_load<6>(a + 64, a_bytes);
    if constexpr (KS > 3) tile_load<7>(a + 96, a_bytes);
    (column<N>(b, s, s_bytes, std::make_integer_sequence<int, KS>{}), ...);
    flush<static_cast<int>(sizeof...(N)) - (kAcc - 1), sizeof...(N)>(s, s_bytes);
  }
};

// More than four steps of 32 channels: the rows do not stay in registers.
template <int N>
HK_INLINE void long_column(const bf16* a, int64_t a_bytes, const bf16* b, int steps, float* s, int64_t s_bytes) {
  tile_zero<N % 4>();
  for (int step = 0; step < steps; ++step) {
    tile_load<4>(a + step * 32, a_bytes);
    tile_load<6>(b + step * kTile, 64);
    tile_dot<N % 4, 4, 6>();
  }
  tile_store<N % 4>(s, s_bytes);
}

template <int KS>
void short_score_tiles(const bf16* a, int64_t a_bytes, const bf16* b, int tiles, float* s, int64_t s_bytes) {
  switch (tiles) {
    case 1: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 1>{});
    case 2: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 2>{});
    case 3: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 3>{});
    case 4: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 4>{});
    case 5: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 5>{});
    case 6: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 6>{});
    case 7: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 7>{});
    default: return ScoreTiles<KS>::run(a, a_bytes, b, s, s_bytes, std::make_integer_sequence<int, 8>{});
  }
}

void long_score_tiles(const bf16* a, int64_t a_bytes, const bf16* b, int tiles, int steps, float* s,
                      int64_t s_bytes) {
  for (int n = 0; n + 1 < tiles; n += 2) {
    long_column<0>(a, a_bytes, b + n * steps * kTile, steps, s + n * 16, s_bytes);
    long_column<1>(a, a_bytes, b + (n + 1) * steps * kTile, steps, s + (n + 1) * 16, s_bytes);
  }
  if (tiles % 2) long_column<2>(a, a_bytes, b + (tiles - 1) * steps * kTile, steps, s + (tiles - 1) * 16, s_bytes);
}

using ScoreKernel = void (*)(const bf16*, int64_t, const bf16*, int, float*, int64_t);
constexpr ScoreKernel kScoreKernels[] = {short_score_tiles<1>, short_score_tiles<2>, short_score_tiles<3>,
                                         short_score_tiles<4>};

// C (16 rows x 16 * tiles) = A (16 rows) * B over `steps` steps of 32, tiles <= 8.
// A: rows a_stride bf16 apart. B: [tile][step]. C: rows c_stride floats apart.
HK_INLINE void score_tiles(const bf16* a, int64_t a_stride, const bf16* b, int tiles, int steps, float* c,
                           int64_t c_stride) {
  if (steps <= 4)
    kScoreKernels[steps - 1](a, 2 * a_stride, b, tiles, c, 4 * c_stride);
  else
    long_score_tiles(a, 2 * a_stride, b, tiles, steps, c, 4 * c_stride);
}

}  // namespace
}  // namespace hierkernels::HK_ISA

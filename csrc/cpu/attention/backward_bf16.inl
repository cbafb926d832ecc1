// bfloat16 attention backward by tiles, as forward_bf16.inl: bitwise repeatable, no atomics.
//
// Everything is kept transposed, keys as rows and queries as lanes:
//   S^T = K Q^T, dP^T = V dO^T               A = K, V rows;      B = Q, dO packed by pairs of channels
//   P^T = exp2(S^T c - lse), dS^T = P^T (dP^T - delta)            lse and delta are vectors: no broadcasts
//   dV += P^T dO, dK += dS^T Q               A as just produced; B = dO, Q packed by pairs of rows
//   dQ^T += K^T dS^T                         A = K^T;            B = dS^T by pairs of keys
// A task is a key/value head, or one of several splits of its packed rows (row r = query r / G of head r % G).
// Its rows are taken in segments whose packs stay in cache; inside, key blocks, row blocks, strips of 32 keys.
// dQ of a segment and dK, dV of the task are sums in float; splits are added in order at the end. With a window, dK and
// dV of a strip of keys are stored when no later row sees it, and its memory is used again: a ring of strips.
#include <omp.h>

#include <cmath>
#include <cstring>

#include "../scratch.h"
#include "../simd.h"
#include "../simd_math.h"
#include "bf16_tiles.h"
#include "attention.h"
#include "kernel_shape.h"
#include "next_inputs.h"
#include "bias_gradient.h"
#include "score_modifiers.h"
#include "strip_modifiers.h"

namespace hierkernels::HK_ISA {
namespace {

constexpr int kBlock = 256;               // keys and rows of a block
constexpr int kTiles = kBlock / 32;       // strips of keys, and tiles of rows, of a block
constexpr int kScoreStride = kBlock + 16; // padded against 4K aliasing
constexpr int kProbStride = kBlock + 32;
constexpr int64_t kSegment = 4096;        // rows whose packs are kept at a time
constexpr int64_t kNarrowSegment = 1024;  // the same, where they see few keys
constexpr int64_t kSplitBytes = int64_t{256} << 20;  // of the sums of dK and dV of all splits, at most
constexpr float kNever = 1e30f;           // the log-sum-exp of a row that sees nothing: exp2(s - kNever) = 0

// dS of two keys, as the pairs that a B tile wants.
alignas(64) constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct Backward {
  const AttentionParams& p;
  const ScoreModifiers modifiers;
  const bool modified;    // anything but a range and a scale
  const bool key_only;    // what is added depends on the key alone
  const bool adds, hides; // per pair: a bias; a mask or padding
  const int G, D, Dv;
  const int steps, v_steps;  // of 32 channels of q and k, of v
  const int64_t B, Hkv, Nq, Nk;
  const int64_t rows, keys;  // packed rows of a key/value head; keys rounded up to 32
  const bool stream_dq, stream_dk, stream_dv;  // written past the caches
  int64_t segment, splits;
  bool narrow = false;  // segments of rows that see few keys: the inputs of the next are asked for
  int64_t ring;  // strips of keys whose sums are kept at a time; those of strip x lie at x % ring

  Backward(const AttentionParams& params, int threads)
      : p(params),
        modifiers(ScoreModifiers::from(params)),
        modified(modifiers.additive || modifiers.dropout || params.softcap != 0 || params.dbias),
        key_only(modifiers.same_for_queries && (params.group() == 1 || modifiers.same_for_heads)),
        adds(!key_only && params.bias),
        hides(!key_only && (params.mask || params.padding)),
        G(static_cast<int>(params.group())),
        D(static_cast<int>(params.dim())),
        Dv(static_cast<int>(params.dim_v())),
        steps((D + 31) / 32),
        v_steps((Dv + 31) / 32),
        B(params.batch()),
        Hkv(params.kv_heads()),
        Nq(params.n_queries()),
        Nk(params.n_keys()),
        rows(Nq * G),
        keys((Nk + 31) & ~int64_t{31}),
        stream_dq(worth_streaming(params.dq)),
        stream_dk(worth_streaming(params.dk)),
        stream_dv(worth_streaming(params.dv)) {
    const int64_t heads = B * Hkv, padded = (rows + 31) & ~int64_t{31};
    // Narrow windows: all that a segment takes, and the sums of the keys that it sees, fit the second-level cache.
    segment = padded < 32 ? 32 : padded < kNarrowSegment ? padded : kNarrowSegment;
    narrow = segment < rows && most_strips() * 32 <= 2 * kNarrowSegment;
    // Few heads: the rows of each are split, so that the threads can share the work evenly. Later rows see more keys, so a
    // split takes every splits-th segment, to and fro; a bias gradient that is shared between rows must not be split.
    // Not with a window, where sums of all keys would cost more than threads that wait.
    const bool window = narrow && keys > 2 * kNarrowSegment;
    splits = 1;
    if (heads > 0 && heads < (window ? threads : 4 * threads) && !p.dbias) {
      const int64_t bytes = heads * keys * (steps + v_steps) * 32 * static_cast<int64_t>(sizeof(float));
      while (splits < threads && heads * splits % threads != 0) ++splits;
      while (splits > 1 && splits * bytes > kSplitBytes) --splits;
    }
    if (!narrow || splits > 1) segment = padded < 32 ? 32 : padded < kSegment ? padded : kSegment;
    if (splits > 1) {
      const int64_t share = (padded + splits * 4 * kBlock - 1) / (splits * 4 * kBlock) * kBlock;  // four segments a split
      segment = share < segment ? share : segment;
      const int64_t segments = (rows + segment - 1) / segment;
      splits = segments < 1 ? 1 : segments < splits ? segments : splits;
    }
    narrow = narrow && splits == 1;
    ring = splits > 1 ? keys / 32 : most_strips();
  }

  // The most strips of keys that a segment of rows sees.
  int64_t most_strips() const {
    int64_t most = 1;
    for (int64_t row = 0; row < rows; row += segment) {
      const int64_t last = (row + segment < rows ? row + segment : rows) - 1;
      const int64_t strips = (p.range.hi.at(last / G, Nk) + 31) / 32 - p.range.lo.at(row / G, Nk) / 32;
      most = strips > most ? strips : most;
    }
    return most;
  }

  int64_t key_floats() const { return ring * steps * 1024; }
  int64_t value_floats() const { return ring * v_steps * 1024; }

  struct Buffers {
    bf16 *q_t, *q_n, *g_t, *g_n;  // packs of a segment of Q and dO: transposed, by rows
    float *lse, *delta, *dq;      // of a segment
    int32_t *lo, *hi;
    uint8_t *dq_begun, *dk_begun; // by tile of rows, by strip of keys
    bf16 *k, *v, *k_t;            // a block of keys: rows, rows, K^T tiles
    float *s, *g;                 // S^T and dP^T of a strip
    bf16 *prob, *ds, *pairs;      // P^T and dS^T of a strip, dS^T of a block by pairs of keys
    float *add, *line;            // transposed bias of a strip, or what is added to the keys of a block; rows to transpose
    uint32_t *seen, *kept;        // by row of a block: what mask, padding and dropout leave of a strip, or of two
    float *dk, *dv;               // of the task
  };
  Buffers allocate() const {
    TypedLayout layout;
    const int64_t q_size = segment * steps * 32, g_size = segment * v_steps * 32;
    const auto q_t = layout.add<bf16>(q_size), q_n = layout.add<bf16>(q_size);
    const auto g_t = layout.add<bf16>(g_size), g_n = layout.add<bf16>(g_size);
    const auto lse = layout.add<float>(segment), delta = layout.add<float>(segment), dq = layout.add<float>(q_size);
    const auto lo = layout.add<int32_t>(segment), hi = layout.add<int32_t>(segment);
    const auto dq_begun = layout.add<uint8_t>(segment / 32), dk_begun = layout.add<uint8_t>(ring);
    const auto k = layout.add<bf16>(kBlock * steps * 32), v = layout.add<bf16>(kBlock * v_steps * 32);
    const auto k_t = layout.add<bf16>(kBlock * steps * 32);
    const auto s = layout.add<float>(32 * kScoreStride), g = layout.add<float>(32 * kScoreStride);
    const auto prob = layout.add<bf16>(32 * kProbStride), ds = layout.add<bf16>(32 * kProbStride);
    const auto pairs = layout.add<bf16>(kBlock * kBlock);
    const auto add = layout.add<float>(adds ? 32 * kScoreStride : kBlock);
    const auto line = layout.add<float>(16 * 32);
    const auto seen = layout.add<uint32_t>(kBlock), kept = layout.add<uint32_t>(2 * kBlock);
    const auto dk = layout.add<float>(splits > 1 ? 0 : key_floats()), dv = layout.add<float>(splits > 1 ? 0 : value_floats());
    char* base = thread_scratch(ScratchUse::kTask, layout.total());
    const auto floats = [&](size_t at) { return layout.at<float>(base, at); };
    const auto halves = [&](size_t at) { return layout.at<bf16>(base, at); };
    return {halves(q_t), halves(q_n), halves(g_t), halves(g_n), floats(lse), floats(delta), floats(dq),
            layout.at<int32_t>(base, lo), layout.at<int32_t>(base, hi), layout.at<uint8_t>(base, dq_begun),
            layout.at<uint8_t>(base, dk_begun), halves(k), halves(v), halves(k_t), floats(s), floats(g),
            halves(prob), halves(ds), halves(pairs), floats(add), floats(line),
            layout.at<uint32_t>(base, seen), layout.at<uint32_t>(base, kept), floats(dk), floats(dv)};
  }
};

HK_INLINE int min_of(int a, int b) { return a < b ? a : b; }

HK_INLINE float dot_row(const bf16* a, const bf16* b, int n) {
  __m512 sum = _mm512_setzero_ps();
  for (int d = 0; d < n; d += 16) {
    const __mmask16 m = first_lanes16(n - d);
    sum = _mm512_fmadd_ps(from_bf16(_mm256_maskz_loadu_epi16(m, a + d)), from_bf16(_mm256_maskz_loadu_epi16(m, b + d)), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

HK_INLINE void store_scaled(bf16* to, int n, __m512 low, __m512 high, __m512 scale, bool stream) {
  const __m512i x = to_bf16(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), x);
  else if (n >= 32)
    _mm512_storeu_si512(to, x);
  else
    _mm512_mask_storeu_epi16(to, first_lanes32(n), x);
}

// dK and dV of a strip of 32 keys, from `parts` sums that lie `distance` floats apart.
void store_strip(const Tensor& to, int64_t b, int64_t h, int64_t j0, int64_t n_keys, int steps, const float* sum,
                 int64_t distance, int64_t parts, float scale, bool stream) {
  const int dim = static_cast<int>(to.size[3]);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int j = 0; j < 32 && j0 + j < n_keys; ++j) {
    bf16* row = to.as<bf16>() + b * to.stride[0] + h * to.stride[1] + (j0 + j) * to.stride[2];
    for (int s = 0; s < steps; ++s) {
      __m512 low = _mm512_setzero_ps(), high = low;
      for (int64_t part = 0; part < parts; ++part) {
        const float* tile = sum + part * distance + s * 4 * kTileC + (j / 16) * 2 * kTileC + j % 16 * 16;
        low = _mm512_add_ps(low, _mm512_load_ps(tile));
        high = _mm512_add_ps(high, _mm512_load_ps(tile + kTileC));
      }
      store_scaled(row + 32 * s, dim - 32 * s, low, high, factor, stream);
    }
  }
}

// The state of one task.
struct Task {
  const Backward& f;
  const Backward::Buffers& m;
  const BiasGradient<float>& dbias;
  float* dbias_sums;
  const int64_t b, h, split;
  float *dk, *dv;
  const __m512 factor;  // of a score, to base 2
  mutable NextInputs next;

  Task(const Backward& backward, const Backward::Buffers& buffers, const BiasGradient<float>& bias_gradient,
       int64_t batch, int64_t kv_head, int64_t which, float* dk_sum, float* dv_sum)
      : f(backward),
        m(buffers),
        dbias(bias_gradient),
        dbias_sums(bias_gradient.of_thread(omp_get_thread_num())),
        b(batch),
        h(kv_head),
        split(which),
        dk(dk_sum),
        dv(dv_sum),
        factor(_mm512_set1_ps(static_cast<float>(backward.p.scale) * kLog2ef)) {
    next.aim(f.p, {&f.p.q, &f.p.dout, &f.p.out, &f.p.k, &f.p.v}, b, h);
  }

  // ---- a segment of rows ----

  int64_t query(int64_t row) const { return f.G == 1 ? row : row / f.G; }
  int64_t head(int64_t row) const { return f.G == 1 ? h : h * f.G + row % f.G; }
  const bf16* at(const Tensor& t, int64_t row) const {
    return t.as<bf16>() + b * t.stride[0] + head(row) * t.stride[1] + query(row) * t.stride[2];
  }

  void load_segment(int64_t row0, int count) const {
    const int padded = (count + 31) & ~31;
    for (int r = 0; r < padded; r += 32) {
      const auto q = [&](int i) { return at(f.p.q, row0 + r + i); };
      const auto g = [&](int i) { return at(f.p.dout, row0 + r + i); };
      const int n = count - r;
      for (int half = 0; half < 32 && half < n; half += 16) {
        pack_transposed([&](int i) { return q(half + i); }, n - half, f.D, f.steps, m.q_t + (r + half) * f.steps * 32);
        pack_transposed([&](int i) { return g(half + i); }, n - half, f.Dv, f.v_steps, m.g_t + (r + half) * f.v_steps * 32);
      }
      pack_rows(q, n, f.D, f.steps, m.q_n + r * f.steps * 32);
      pack_rows(g, n, f.Dv, f.v_steps, m.g_n + r * f.v_steps * 32);
    }
    f.p.range.lo.fill(row0, count, f.G, f.Nk, m.lo);
    f.p.range.hi.fill(row0, count, f.G, f.Nk, m.hi);
    for (int r = 0; r < count; ++r) {
      const int64_t i = query(row0 + r), line = (b * f.p.heads() + head(row0 + r)) * f.Nq + i;
      const float lse = f.p.lse.as<float>()[line];
      const bool empty = lse == -INFINITY;
      m.lse[r] = empty ? kNever : lse * kLog2ef;
      m.delta[r] = empty ? 0.f
                         : dot_row(at(f.p.out, row0 + r), at(f.p.dout, row0 + r), f.Dv) -
                               (f.p.dlse ? f.p.dlse.as<float>()[line] : 0.f);
      next.ask(f.steps);
    }
    if (f.p.dbias)
      for (int r = 0; r < count; ++r)
        dbias.begin_row(dbias_sums, b, head(row0 + r), query(row0 + r), m.lo[r], m.hi[r]);
    for (int r = count; r < padded; ++r) {
      m.lo[r] = m.lo[count - 1];
      m.hi[r] = m.hi[count - 1];
      m.lse[r] = kNever;
      m.delta[r] = 0;
    }
    std::memset(m.dq_begun, 0, padded / 32);
  }

  void store_dq(int64_t row0, int count) const {
    const __m512 scale = _mm512_set1_ps(static_cast<float>(f.p.scale));
    for (int r = 0; r < count; r += 16) {
      for (int s = 0; s < f.steps; ++s) {
        __m512i x[2][16];
        for (int half = 0; half < 2; ++half) {  // dQ^T tiles of 32 rows: [step][half of the channels][half of the rows]
          const float* tile = m.dq + (r & ~31) * f.steps * 32 + ((s * 2 + half) * 2 + (r >> 4 & 1)) * kTileC;
          for (int e = 0; e < 16; ++e)
            x[half][e] = m.dq_begun[r / 32] ? _mm512_load_si512(tile + e * 16) : _mm512_setzero_si512();
          transpose16(x[half]);
        }
        for (int e = 0; e < 16 && r + e < count; ++e)
          store_scaled(const_cast<bf16*>(at(f.p.dq, row0 + r + e)) + s * 32, f.D - s * 32,
                       _mm512_castsi512_ps(x[0][e]), _mm512_castsi512_ps(x[1][e]), scale, f.stream_dq);
      }
    }
  }

  // ---- a block of keys ----

  void load_keys(int64_t j0, int n) const {
    const Tensor &k = f.p.k, &v = f.p.v;
    const bf16* k0 = k.as<bf16>() + b * k.stride[0] + h * k.stride[1] + j0 * k.stride[2];
    const bf16* v0 = v.as<bf16>() + b * v.stride[0] + h * v.stride[1] + j0 * v.stride[2];
    const __m512i none = _mm512_setzero_si512();
    for (int j = 0; j < n; ++j) {
      copy_row(k0 + j * k.stride[2], f.D, f.steps, none, m.k + j * f.steps * 32);
      copy_row(v0 + j * v.stride[2], f.Dv, f.v_steps, none, m.v + j * f.v_steps * 32);
      next.ask(f.steps);
    }
    if (n % 2) {  // elements come by pairs of keys
      zero_row(f.steps, m.k + n * f.steps * 32);
      zero_row(f.v_steps, m.v + n * f.v_steps * 32);
    }
    // K^T tiles, [32 keys][16 channels]: pairs of keys by channel, then each tile's dwords transposed.
    for (int j = 0; j < n; j += 32) {
      bf16* tiles = m.k_t + j * f.steps * 32;
      pack_rows([&](int i) { return k0 + (j + i) * k.stride[2]; }, n - j, f.D, f.steps, tiles);
      for (int t = 0; t < 2 * f.steps; ++t) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(tiles + t * kTile + i * 32);
        transpose16(x);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(tiles + t * kTile + i * 32, x[i]);
      }
    }
  }

  // ---- one strip of 32 keys against the row tiles [t0, t1) of a row block ----

  // A (keys, m.k or m.v) * B (packs of the row block) -> scores. Halves of 16 keys and of 16 rows in the last tile.
  static HK_INLINE void scores(const bf16* a, const bf16* b_pack, int steps, int key_halves, int t0, int t1,
                               int last_halves, float* s) {
    const int64_t width = steps * 32, column = steps * kTile;
    for (int t = t0; t < t1; ++t) {
      const TileGrid c{s + t * 32, kScoreStride, 16 * kScoreStride, 16};
      const bf16* b = b_pack + 2 * t * column;
      const bool narrow = t + 1 == t1 && last_halves == 1;
      if (key_halves == 2 && !narrow)
        accumulate<2, 2>(c, true, a, width, 16 * width, 32, b, column, kTile, steps);
      else if (key_halves == 2)
        accumulate<2, 1>(c, true, a, width, 16 * width, 32, b, column, kTile, steps);
      else if (!narrow)
        accumulate<1, 2>(c, true, a, width, 16 * width, 32, b, column, kTile, steps);
      else
        accumulate<1, 1>(c, true, a, width, 16 * width, 32, b, column, kTile, steps);
    }
  }

  struct Lanes {
    const float *lse, *delta;
    const int32_t *lo, *hi;
  };

  // Two keys j, j + 1 (rows of S and G) against 32 rows of queries: P^T, dS^T and its pairs.
  template <bool kEdge, bool kModified, int kHalves>
  HK_INLINE void element(float* s, float* g, const Lanes& lanes, int j, int64_t key, int lane0, bf16* prob, bf16* ds,
                         bf16* pair, int64_t pair_half) const {
    const __m512i interleave = _mm512_load_si512(kInterleave);
    __m512 pr[2][2], d[2][2];
    if constexpr (kHalves == 1) {
      pr[0][1] = pr[1][1] = d[0][1] = d[1][1] = _mm512_setzero_ps();
      _mm512_store_si512(pair + pair_half, _mm512_setzero_si512());
    }
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      const __m512 lse = _mm512_loadu_ps(lanes.lse + 16 * half), delta = _mm512_loadu_ps(lanes.delta + 16 * half);
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const int64_t at = r * kScoreStride + 16 * half;
        __m512 x = _mm512_load_ps(s + at), dp = _mm512_load_ps(g + at), slope = _mm512_set1_ps(1.f), keep = slope;
        if constexpr (kModified) {
          const float cap = static_cast<float>(f.p.softcap);
          if (cap != 0) {
            const __m512 t = tanh<VecF>(_mm512_mul_ps(x, _mm512_set1_ps(static_cast<float>(f.p.scale) / cap)));
            slope = _mm512_fnmadd_ps(t, t, slope);
            x = _mm512_mul_ps(t, _mm512_set1_ps(cap * kLog2ef));
          } else {
            x = _mm512_mul_ps(x, factor);
          }
          if (f.adds)
            x = _mm512_add_ps(x, _mm512_load_ps(m.add + (j + r) % 32 * kScoreStride + lane0 + 16 * half));
          else if (f.modifiers.additive && f.key_only)
            x = _mm512_add_ps(x, _mm512_set1_ps(m.add[j + r]));
          x = exp2_bf16(_mm512_min_ps(_mm512_setzero_ps(), _mm512_sub_ps(x, lse)));  // rounding of huge scores
          if (f.hides) x = _mm512_maskz_mov_ps(rows_with(m.seen + lane0 + 16 * half, (j + r) % 32), x);
          if (f.modifiers.dropout) {
            keep = _mm512_maskz_mov_ps(rows_with(m.kept + j / 32 % 2 * kBlock + lane0 + 16 * half, (j + r) % 32),
                                       _mm512_set1_ps(static_cast<float>(f.modifiers.keep_factor)));
            dp = _mm512_mul_ps(dp, keep);
          }
        } else {
          x = exp2_bf16(_mm512_fmsub_ps(x, factor, lse));
        }
        if constexpr (kEdge) {
          const __m512i k = _mm512_set1_epi32(static_cast<int>(key) + r);
          const __mmask16 see = _mm512_cmple_epi32_mask(_mm512_loadu_si512(lanes.lo + 16 * half), k) &
                                _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(lanes.hi + 16 * half), k);
          x = _mm512_maskz_mov_ps(see, x);
        }
        __m512 y = _mm512_mul_ps(x, _mm512_sub_ps(dp, delta));
        if constexpr (kModified) {
          if (f.p.dbias) _mm512_store_ps(s + at, y);  // the bias gradient reads it
          x = _mm512_mul_ps(x, keep);
          y = _mm512_mul_ps(y, slope);
        }
        pr[r][half] = x;
        d[r][half] = y;
      }
      _mm512_store_si512(pair + half * pair_half, _mm512_permutexvar_epi16(interleave, to_bf16(d[0][half], d[1][half])));
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      _mm512_store_si512(prob + r * kProbStride, to_bf16(pr[r][0], pr[r][1]));
      _mm512_store_si512(ds + r * kProbStride, to_bf16(d[r][0], d[r][1]));
    }
  }

  template <bool kEdge, bool kModified, int kHalves>
  void elements(int strip, int keys, int t, int64_t key0, int64_t first_row) const {
    const Lanes lanes{m.lse + first_row + t * 32, m.delta + first_row + t * 32, m.lo + first_row + t * 32,
                      m.hi + first_row + t * 32};
    bf16* pair = m.pairs + (t * 2 * kTiles + strip) * kTile;
    int j = 0;
    for (; j < keys; j += 2) {
      element<kEdge, kModified, kHalves>(m.s + j * kScoreStride + t * 32, m.g + j * kScoreStride + t * 32, lanes,
                                         strip * 32 + j, key0 + strip * 32 + j, t * 32, m.prob + j * kProbStride + t * 32,
                                         m.ds + j * kProbStride + t * 32, pair + j / 2 * 32, kTiles * kTile);
      next.ask(f.steps);
    }
    for (; j < 32; j += 2) {  // keys past the end must be finite: they meet zeros of K^T
      _mm512_store_si512(pair + j / 2 * 32, _mm512_setzero_si512());
      _mm512_store_si512(pair + kTiles * kTile + j / 2 * 32, _mm512_setzero_si512());
    }
  }

  // sum (32 keys x dim channels, tiles [step][row half][column half]) += A^T-like strip * B over rows [t0, t1).
  static HK_INLINE void reduce(const bf16* a, const bf16* pack, int dim, int key_halves, int t0, int t1, float* sum,
                               bool first) {
    const int steps = (dim + 31) / 32;
    const int64_t row_tile = 2 * steps * kTile;
    for (int s = 0; s < steps; ++s) {
      const TileGrid c{sum + s * 4 * kTileC, 16, 2 * kTileC, kTileC};
      const bf16* b = pack + t0 * row_tile + 2 * s * kTile;
      const bool narrow = dim - 32 * s <= 16;  // the second half of the channels is never stored
      if (key_halves == 2 && narrow)
        accumulate<2, 1>(c, first, a + t0 * 32, kProbStride, 16 * kProbStride, 32, b, kTile, row_tile, t1 - t0);
      else if (key_halves == 2)
        accumulate<2, 2>(c, first, a + t0 * 32, kProbStride, 16 * kProbStride, 32, b, kTile, row_tile, t1 - t0);
      else if (narrow)
        accumulate<1, 1>(c, first, a + t0 * 32, kProbStride, 16 * kProbStride, 32, b, kTile, row_tile, t1 - t0);
      else
        accumulate<1, 2>(c, first, a + t0 * 32, kProbStride, 16 * kProbStride, 32, b, kTile, row_tile, t1 - t0);
    }
  }

  // By: edge of the range 1, modified 2, one half of the rows 4.
  using Elements = void (Task::*)(int, int, int, int64_t, int64_t) const;
  static constexpr Elements kElements[] = {
      &Task::elements<false, false, 2>, &Task::elements<true, false, 2>, &Task::elements<false, true, 2>,
      &Task::elements<true, true, 2>,   &Task::elements<false, false, 1>, &Task::elements<true, false, 1>,
      &Task::elements<false, true, 1>,  &Task::elements<true, true, 1>};

  // ---- the loops ----

  // Row block [row, row + n) of the segment (row a multiple of 32) against the key block at j0 with `strips` strips.
  void block(int64_t row0, int row, int n, int64_t j0, int strips) const {
    const int tiles = (n + 31) / 32;
    const bf16 *q_t = m.q_t + row * f.steps * 32, *g_t = m.g_t + row * f.v_steps * 32;
    const bf16 *q_n = m.q_n + row * f.steps * 32, *g_n = m.g_n + row * f.v_steps * 32;
    int begin[kTiles], end[kTiles];  // the strips that each tile of rows sees
    for (int t = 0; t < tiles; ++t) begin[t] = end[t] = 0;
    if (f.modifiers.additive && f.key_only)
      f.modifiers.additive_row(b, h * f.G, query(row0 + row), j0, f.Nk - j0 < kBlock ? f.Nk - j0 : kBlock, m.add);
    int kept_pair = -1;  // of strips, whose bits of dropout are there
    for (int strip = 0; strip < strips; ++strip) {
      const int64_t key = j0 + strip * 32;
      // Both bounds rise with the row, so the tiles that see the strip are a range.
      int t0 = 0, t1 = tiles;
      while (t0 < tiles && m.hi[row + t0 * 32 + 31] <= key) ++t0;
      while (t1 > t0 && m.lo[row + (t1 - 1) * 32] >= key + 32) --t1;
      if (t0 >= t1) continue;
      for (int t = t0; t < t1; ++t) {
        if (end[t] == 0) begin[t] = strip;
        end[t] = strip + 1;
      }
      if (f.adds || f.hides || f.modifiers.dropout) load_modifiers(row0 + row, row, n, key, t0, t1, kept_pair);
      if (f.adds && strip + 1 == strips) {
        for (int64_t r = row0 + row + kBlock; r < row0 + row + 2 * kBlock && r < f.rows; ++r)
          f.modifiers.prefetch_row(b, head(r), query(r), j0, 32);
      }
      const int keys = static_cast<int>(f.Nk - key < 32 ? f.Nk - key : 32), key_halves = keys > 16 ? 2 : 1;
      const int last_halves = n - (t1 - 1) * 32 > 16 ? 2 : 1;
      scores(m.k + strip * 32 * f.steps * 32, q_t, f.steps, key_halves, t0, t1, last_halves, m.s);
      scores(m.v + strip * 32 * f.v_steps * 32, g_t, f.v_steps, key_halves, t0, t1, last_halves, m.g);
      for (int t = t0; t < t1; ++t) {
        const bool inside = m.lo[row + t * 32 + 31] <= key && m.hi[row + t * 32] >= key + 32;
        const int kind = (inside ? 0 : 1) + (f.modified ? 2 : 0) + (t + 1 == t1 && last_halves == 1 ? 4 : 0);
        (this->*kElements[kind])(strip, keys, t, j0, row);
      }
      if (f.p.dbias) add_bias_gradient(row0 + row, n, t0, t1, key);
      const int64_t at = key / 32 % f.ring;
      const bool first = !m.dk_begun[at];
      m.dk_begun[at] = 1;
      reduce(m.prob, g_n, f.Dv, key_halves, t0, t1, dv + at * f.v_steps * 1024, first);
      reduce(m.ds, q_n, f.D, key_halves, t0, t1, dk + at * f.steps * 1024, first);
    }
    for (int t = 0; t < tiles; ++t) {
      if (begin[t] >= end[t]) continue;
      const int64_t at = row / 32 + t, strip_tiles = 2 * f.steps * kTile;
      for (int s = 0; s < f.steps; ++s) {
        const TileGrid c{m.dq + at * f.steps * 1024 + s * 4 * kTileC, 16, 2 * kTileC, kTileC};
        const bf16 *a = m.k_t + begin[t] * strip_tiles + 2 * s * kTile, *pairs = m.pairs + (t * 2 * kTiles + begin[t]) * kTile;
        if (f.D - 32 * s <= 16)
          accumulate<1, 2>(c, !m.dq_begun[at], a, 32, kTile, strip_tiles, pairs, kTiles * kTile, kTile, end[t] - begin[t]);
        else
          accumulate<2, 2>(c, !m.dq_begun[at], a, 32, kTile, strip_tiles, pairs, kTiles * kTile, kTile, end[t] - begin[t]);
      }
      m.dq_begun[at] = 1;
    }
  }

  // Stores dK and dV of the strips [stored, end), which no row to come sees.
  void store_keys(int64_t& stored, int64_t end) const {
    for (; stored < end; ++stored) {
      float *dk_strip = strip_of_dk(stored), *dv_strip = strip_of_dv(stored);
      clear_unseen(stored);
      m.dk_begun[stored % f.ring] = 0;
      store_strip(f.p.dk, b, h, stored * 32, f.Nk, f.steps, dk_strip, 0, 1, static_cast<float>(f.p.scale), f.stream_dk);
      store_strip(f.p.dv, b, h, stored * 32, f.Nk, f.v_steps, dv_strip, 0, 1, 1.f, f.stream_dv);
    }
  }
  float* strip_of_dk(int64_t strip) const { return dk + strip % f.ring * f.steps * 1024; }
  float* strip_of_dv(int64_t strip) const { return dv + strip % f.ring * f.v_steps * 1024; }
  // Sums that nothing was added to are zero.
  void clear_unseen(int64_t strip) const {
    if (m.dk_begun[strip % f.ring]) return;
    std::memset(strip_of_dk(strip), 0, 4 * 1024 * f.steps);
    std::memset(strip_of_dv(strip), 0, 4 * 1024 * f.v_steps);
  }

  // Aims at the segment of rows from `row` on, with the keys from `known` on; behind the last, at the next head's first.
  void aim_at_following(int64_t row, int64_t known) const {
    int64_t batch = b, kv_head = h;
    next.aim_at_nothing();
    if (row >= f.rows) {
      row = known = 0;
      if (++kv_head == f.Hkv) {
        kv_head = 0;
        if (++batch == f.B) return;
      }
    }
    const int64_t end = row + f.segment < f.rows ? row + f.segment : f.rows;
    const int64_t first_key = f.p.range.lo.at(row / f.G, f.Nk), end_key = f.p.range.hi.at((end - 1) / f.G, f.Nk);
    next.also({&f.p.q, &f.p.dout, &f.p.out}, batch, kv_head * f.G, f.G, row / f.G, (end - 1) / f.G + 1);
    next.also({&f.p.k, &f.p.v}, batch, kv_head, 1, first_key > known ? first_key : known, end_key);
  }

  void run() const {
    std::memset(m.dk_begun, 0, f.ring);
    const int64_t strips = f.keys / 32;
    int64_t stored = 0;
    for (int64_t round = 0; round * f.splits * f.segment < f.rows; ++round) {
      // To and fro: with a causal range the last segments see most keys.
      const int64_t row0 = (round * f.splits + (round % 2 ? f.splits - 1 - split : split)) * f.segment;
      if (row0 >= f.rows) continue;
      const int count = static_cast<int>(f.rows - row0 < f.segment ? f.rows - row0 : f.segment);
      if (f.narrow) aim_at_following(row0 + f.segment, f.p.range.hi.at((row0 + count - 1) / f.G, f.Nk));
      load_segment(row0, count);
      if (f.splits == 1) store_keys(stored, m.lo[0] / 32);
      const int64_t begin = m.lo[0] / kBlock * kBlock, end = m.hi[count - 1];
      for (int64_t j0 = begin; j0 < end; j0 += kBlock) {
        const int n = static_cast<int>(f.Nk - j0 < kBlock ? f.Nk - j0 : kBlock);
        // The rows that see the block: from the first with hi > j0 to before the first with lo >= j0 + n.
        int first = 0, last = (count + 31) & ~31;
        while (first < last && m.hi[first + 31] <= j0) first += 32;
        while (last > first && m.lo[last - 32] >= j0 + n) last -= 32;
        if (first >= last) continue;
        load_keys(j0, n);
        for (int row = first; row < last; row += kBlock)
          block(row0, row, min_of(last, count) - row < kBlock ? min_of(last, count) - row : kBlock, j0, (n + 31) / 32);
      }
      next.ask_rest();
      store_dq(row0, count);
    }
    if (f.splits == 1)
      store_keys(stored, strips);
    else
      for (int64_t strip = 0; strip < strips; ++strip) clear_unseen(strip);
  }

  // ---- modifiers ----

  // What changes the scores of the strip at `key` for the tiles [t0, t1) of the row block at row `first` of the head, row
  // `row` of the segment. Dropout is drawn for a pair of strips, those after the first kept.
  void load_modifiers(int64_t first, int row, int n, int64_t key, int t0, int t1, int& kept_pair) const {
    const StripModifiers strip{f.modifiers, f.Nk, kScoreStride, m.add, m.seen, {m.kept, m.kept + kBlock}, m.line};
    const auto place = [&](int r, int64_t& hq, int64_t& i) {
      const int64_t clipped = first + r < f.rows ? first + r : f.rows - 1;  // rows past the end weigh nothing
      hq = head(clipped);
      i = query(clipped);
    };
    const int begin = t0 * 32, end = min_of(t1 * 32, (n + 15) & ~15);
    for (int r = begin; f.adds && r < end; r += 16) strip.load_bias(b, place, r, key);
    if (f.hides) strip.load_seen(b, place, begin, end, key);
    const int pair = static_cast<int>(key / 64);
    if (!f.modifiers.dropout || pair == kept_pair) return;
    kept_pair = pair;
    int tiles = (n + 31) / 32;  // up to the last that sees a key of the pair
    while (tiles > t1 && m.lo[row + (tiles - 1) * 32] >= pair * int64_t{64} + 64) --tiles;
    strip.load_kept(b, place, begin, min_of(tiles * 32, (n + 15) & ~15), pair * int64_t{64});
  }

  // dS^T of a strip (in m.s) into the bias gradient.
  void add_bias_gradient(int64_t row, int n, int t0, int t1, int64_t key) const {
    const int64_t keys = f.Nk - key < 32 ? f.Nk - key : 32;
    for (int r = t0 * 32; r < t1 * 32 && r < n; r += 16) {
      __m512i x[2][16];
      for (int half = 0; half < 2; ++half) {
        for (int e = 0; e < 16; ++e) x[half][e] = _mm512_load_si512(m.s + (half * 16 + e) * kScoreStride + r);
        transpose16(x[half]);
      }
      for (int e = 0; e < 16 && row + r + e < f.rows; ++e)
        dbias.add_row(dbias_sums, b, head(row + r + e), query(row + r + e), key, keys, _mm512_castsi512_ps(x[0][e]),
                      _mm512_castsi512_ps(x[1][e]));
    }
  }
};

}  // namespace

void attention_backward(const AttentionParams& p) {
  const Backward f(p, omp_get_max_threads());
  const int64_t heads = f.B * f.Hkv, tasks = heads * f.splits;
  const BiasGradient<float> dbias(p, omp_get_max_threads());  // zeros, if nothing is to be added
  if (heads == 0) return;
  const int at_once = tasks_at_once(tasks);
  advise_huge_pages(p.dq.data, p.dq.span_bytes());
  advise_huge_pages(p.dk.data, p.dk.span_bytes());
  advise_huge_pages(p.dv.data, p.dv.span_bytes());
  const float scale = static_cast<float>(p.scale);
  const int64_t k_size = f.key_floats(), v_size = f.value_floats();
  float* sums = f.splits > 1 ? reinterpret_cast<float*>(thread_scratch(ScratchUse::kShared, 4 * tasks * (k_size + v_size))) : nullptr;
#pragma omp parallel
  {
    const Backward::Buffers buffers = f.allocate();
    const ProductSession session;
    const auto run = [&](int64_t t) {
      const int64_t head = t / f.splits, b = head / f.Hkv, h = head % f.Hkv;
      float* dk = sums ? sums + t * (k_size + v_size) : buffers.dk;
      float* dv = sums ? dk + k_size : buffers.dv;
      Task(f, buffers, dbias, b, h, t % f.splits, dk, dv).run();
    };
    if (dbias.by_heads()) {
#pragma omp for schedule(dynamic)
      for (int64_t h = 0; h < f.Hkv; ++h)
        for (int64_t b = 0; b < f.B; ++b) run(b * f.Hkv + h);  // not split, since there is a gradient of the bias
    } else if (dbias.fixed()) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tasks; ++t) run(t);
    } else {
#pragma omp for schedule(dynamic, at_once)
      for (int64_t t = 0; t < tasks; ++t) run(t);
    }
    _mm_sfence();  // streamed stores become visible to the thread that goes on
    if (sums) {
      const int64_t strips = f.keys / 32, distance = k_size + v_size;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < heads * strips; ++t) {
        const int64_t head = t / strips, j0 = t % strips * 32;
        const float* dk = sums + head * f.splits * distance;
        store_strip(p.dk, head / f.Hkv, head % f.Hkv, j0, f.Nk, f.steps, dk + j0 * f.steps * 32, distance, f.splits, scale, f.stream_dk);
        store_strip(p.dv, head / f.Hkv, head % f.Hkv, j0, f.Nk, f.v_steps, dk + k_size + j0 * f.v_steps * 32, distance,
                    f.splits, 1.f, f.stream_dv);
      }
    }
  }
  dbias.finish();
}

}  // namespace hierkernels::HK_ISA

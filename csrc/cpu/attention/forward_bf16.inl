// bfloat16 attention forward by tiles of 16 rows x 32 terms: AMX, or the dot products of AVX-512.
// The file that includes it has chosen the products, amx_products.h or dot_products.h.
//
// A task is 128 packed rows of one key/value head: row r is query r / G of head r % G of its group. For each
// block of 128 keys, and each strip of 32 rows in it: scores S = Q K^T by tiles into a buffer that stays in L1,
// softmax numerators P by rows, O += P V by tiles. K and V are packed once a key/value head when several tasks
// share them, else block by block inside the task. A thread that computes a whole head packs keys when the first row
// sees them, over those that no later row sees: with a window, the packs stay in cache.
//
// The phases are not interleaved: AMX and 512-bit FMA hardly overlap on the machines at hand.
#include <omp.h>

#include <cmath>

#include "../scratch.h"
#include "../simd.h"
#include "../simd_math.h"
#include "bf16_tiles.h"
#include "attention.h"
#include "mask_bits.h"
#include "next_inputs.h"
#include "score_modifiers.h"

namespace hierkernels::HK_ISA {
namespace {

constexpr int kRows = 128;                // rows of a task
constexpr int kKeys = 128;                // keys of a block
constexpr int kStrip = 32;                // rows that share a score buffer
constexpr int kWords = kKeys / 32;        // of bits, one for each key of a block
// Where every 16 rows see few keys (a window), strips of 16 rows take all of theirs in one step, in the same buffers.
constexpr int kNarrowStrip = 16, kNarrowKeys = 2 * kKeys;
constexpr int kScoreStride = kKeys + 16;  // padded against 4K aliasing; twice as much in narrow strips
constexpr int kProbStride = kKeys + 32;
// The maximum of a row is raised only when a score exceeds it by 2^8: a rescaled accumulator is rare, and
// bfloat16 probabilities lose nothing.
constexpr float kSlack = 8.f;
constexpr float kLowest = -3e38f;  // the maximum before any key: finite, so that -inf - max is never NaN
constexpr int64_t kSharedPackBytes = 256 << 20;

// ---- the kernel ----

struct Forward {
  const AttentionParams& p;
  const ScoreModifiers modifiers;
  const bool shared_row;  // what is added or hidden is the same for all rows of a task
  const bool modified;    // scores go through modify_row
  const bool hides;       // rows differ in the keys that mask and padding show them
  const int G, D, Dv;
  const int steps;      // of 32 channels of q and k
  const int v_steps;    // of 32 channels of v
  const int64_t B, Hkv, Nq, Nk;
  const int64_t rows;   // packed rows of a key/value head
  const int64_t blocks; // tasks of a key/value head
  const bool share;     // K and V packed once a head
  const bool stream;    // a large output of whole, aligned cache lines goes past the caches
  const bool own;       // K and V are packed by the thread that computes the head
  const int64_t ring;   // keys that are kept packed; key j lies at j % ring
  const int64_t o_stride;
  const bool narrow;         // strips of kNarrowStrip rows
  const int score_stride, prob_stride;
  const __m512i flip;   // a negative scale is moved into q
  const float scale;    // its absolute value

  Forward(const AttentionParams& params, int64_t threads)
      : p(params),
        modifiers(ScoreModifiers::from(params)),
        shared_row(modifiers.same_for_queries && (params.group() == 1 || modifiers.same_for_heads)),
        modified(params.softcap != 0 || params.bias || (modifiers.additive && shared_row)),
        hides(!shared_row && (params.mask || params.padding)),
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
        blocks((rows + kRows - 1) / kRows),
        share(blocks > 1),
        stream(worth_streaming(params.out)),
        // Where it shares the work evenly, each thread packs the heads that it computes: they are still in its caches
        // then, and no thread waits.
        own(share && (B * Hkv % threads == 0 || B * Hkv >= 8 * threads)),
        ring(own ? most_keys() : padded_keys()),
        o_stride(v_steps * 32 + 16),
        narrow(kNarrowStrips && share && !modified && !hides && !modifiers.dropout && sees_few_keys()),
        score_stride(narrow ? 2 * kScoreStride : kScoreStride),
        prob_stride(narrow ? 2 * kProbStride : kProbStride),
        flip(_mm512_set1_epi16(params.scale < 0 ? static_cast<int16_t>(0x8000) : 0)),
        scale(std::fabs(static_cast<float>(params.scale))) {}

  int64_t padded_keys() const { return (Nk + kKeys - 1) / kKeys * kKeys; }
  // What the rows of a block see, from a multiple of kKeys on.
  int64_t first_key(int64_t block) const { return p.range.lo.at(block * kRows / G, Nk) / kKeys * kKeys; }
  int64_t end_key(int64_t block) const {
    const int64_t end = block * kRows + kRows < rows ? block * kRows + kRows : rows;
    return p.range.hi.at((end - 1) / G, Nk);
  }
  int64_t most_keys() const {
    int64_t most = kKeys;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t keys = (end_key(block) - first_key(block) + kKeys - 1) / kKeys * kKeys;
      most = keys > most ? keys : most;
    }
    return most;
  }

  // Whether any kNarrowStrip rows that follow one another see kNarrowKeys at most, from a multiple of 32 on.
  bool sees_few_keys() const {
    for (int64_t row = 0; row < rows; row += kNarrowStrip) {
      const int64_t last = (row + kNarrowStrip < rows ? row + kNarrowStrip : rows) - 1;
      if (p.range.hi.at(last / G, Nk) - p.range.lo.at(row / G, Nk) / 32 * 32 > kNarrowKeys) return false;
    }
    return true;
  }

  // Buffers of a thread.
  struct Buffers {
    float *s, *o, *top, *limit, *sum, *add;
    bf16 *prob, *q, *k, *v;
    int32_t *lo, *hi;
    uint32_t* seen;  // [row of the strip][word]
  };
  Buffers allocate() const {
    TypedLayout layout;
    const auto s = layout.add<float>(kStrip * kScoreStride), o = layout.add<float>(kRows * o_stride);
    const auto top = layout.add<float>(kRows), limit = layout.add<float>(kRows);
    const auto sum = layout.add<float>(kRows * 16), add = layout.add<float>(kKeys);
    const auto prob = layout.add<bf16>(kStrip * kProbStride), q = layout.add<bf16>(kRows * steps * 32);
    const auto k = layout.add<bf16>(share ? 0 : kKeys * steps * 32), v = layout.add<bf16>(share ? 0 : kKeys * v_steps * 32);
    const auto lo = layout.add<int32_t>(kRows), hi = layout.add<int32_t>(kRows);
    const auto seen = layout.add<uint32_t>(kStrip * kWords);
    char* base = thread_scratch(ScratchUse::kTask, layout.total());
    return {layout.at<float>(base, s),   layout.at<float>(base, o),   layout.at<float>(base, top),
            layout.at<float>(base, limit), layout.at<float>(base, sum), layout.at<float>(base, add),
            layout.at<bf16>(base, prob), layout.at<bf16>(base, q),    layout.at<bf16>(base, k),
            layout.at<bf16>(base, v),    layout.at<int32_t>(base, lo), layout.at<int32_t>(base, hi),
            layout.at<uint32_t>(base, seen)};
  }

  // The keys [j0, j0 + 32) into their packed places.
  void pack_keys(int64_t b, int64_t h, int64_t j0, bf16* k, bf16* v) const {
    const int n = static_cast<int>(Nk - j0 < 32 ? Nk - j0 : 32);
    const int64_t ks = p.k.stride[2], vs = p.v.stride[2];
    const bf16* k0 = p.k.as<bf16>() + b * p.k.stride[0] + h * p.k.stride[1] + j0 * ks;
    const bf16* v0 = p.v.as<bf16>() + b * p.v.stride[0] + h * p.v.stride[1] + j0 * vs;
    pack_transposed([=](int i) { return k0 + i * ks; }, n, D, steps, k);
    if (n > 16) pack_transposed([=](int i) { return k0 + (16 + i) * ks; }, n - 16, D, steps, k + 16 * steps * 32);
    pack_rows([=](int i) { return v0 + i * vs; }, n, Dv, v_steps, v);
  }
};

// The state of one task.
struct Task {
  const Forward& f;
  const Forward::Buffers& m;
  const int64_t b, h, row0;
  const int count;  // rows, at most kRows
  const float factor, per_factor;  // of a score, to base 2; the inverse
  mutable NextInputs next;

  Task(const Forward& forward, const Forward::Buffers& buffers, int64_t batch, int64_t kv_head, int64_t block)
      : f(forward),
        m(buffers),
        b(batch),
        h(kv_head),
        row0(block * kRows),
        count(static_cast<int>(f.rows - row0 < kRows ? f.rows - row0 : kRows)),
        factor(f.modified ? 1.f : f.scale * kLog2ef),
        per_factor(1.f / factor) {
    if (f.own && f.narrow)
      aim_at_following(block);
    else
      next.aim(f.p, {&f.p.k, &f.p.q, &f.p.v}, b, h);
  }

  // Aims at the rows of the next block, and the keys that are packed for it.
  void aim_at_following(int64_t block) const {
    next.aim_at_nothing();
    if (++block == f.blocks) return;
    const int64_t first = block * kRows, end = first + kRows < f.rows ? first + kRows : f.rows;
    const int64_t packed = (f.end_key(block - 1) + 31) & ~int64_t{31}, key = f.first_key(block);
    next.also({&f.p.k, &f.p.v}, b, h, 1, key > packed ? key : packed, f.end_key(block));
    next.also({&f.p.q}, b, h * f.G, f.G, first / f.G, (end - 1) / f.G + 1);
  }

  int64_t query(int r) const { return f.G == 1 ? row0 + r : (row0 + r) / f.G; }
  int64_t head(int r) const { return f.G == 1 ? h : h * f.G + (row0 + r) % f.G; }

  void load_rows() {
    const int padded = (count + 15) & ~15;
    const Tensor &q = f.p.q, &out = f.p.out;
    f.p.range.lo.fill(row0, count, f.G, f.Nk, m.lo);
    f.p.range.hi.fill(row0, count, f.G, f.Nk, m.hi);
    for (int r = 0; r < count; ++r) {
      const int64_t i = query(r), hq = head(r);
      const bf16* row = q.as<bf16>() + b * q.stride[0] + hq * q.stride[1] + i * q.stride[2];
      copy_row(row, f.D, f.steps, f.flip, m.q + r * f.steps * 32);
      next.ask(f.steps);
      if (!f.share && !f.stream)
        prefetch_to_write(out.as<bf16>() + b * out.stride[0] + hq * out.stride[1] + i * out.stride[2], 64 * f.v_steps);
    }
    for (int r = count; r < padded; ++r) zero_row(f.steps, m.q + r * f.steps * 32);
  }

  // Sums of row r so far, to a maximum that is higher by -log2_shrink.
  __attribute__((noinline, cold)) void rescale(int r, float log2_shrink) const {
    const __m512 shrink = _mm512_set1_ps(std::exp2(log2_shrink));
    _mm512_store_ps(m.sum + 16 * r, _mm512_mul_ps(shrink, _mm512_load_ps(m.sum + 16 * r)));
    float* o = m.o + r * f.o_stride;
    for (int d = 0; d < f.v_steps * 32; d += 16)
      _mm512_store_ps(o + d, _mm512_mul_ps(shrink, _mm512_load_ps(o + d)));
  }

  // Scaled scores with the bias of n keys, of which those in [begin, end) have one.
  template <class T>
  static void modify_direct(int n, float scale, const T* bias, int64_t begin, int64_t end, float* s) {
    const __m512 inner = _mm512_set1_ps(scale), log2e = _mm512_set1_ps(kLog2ef);
    for (int j = 0; j < n; j += 16) {
      const __mmask16 valid = first_lanes16(end - j) & ~first_lanes16(begin - j);
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(s + j), inner);
      __m512 added;
      if constexpr (sizeof(T) == 4)
        added = _mm512_maskz_loadu_ps(valid, bias + j);
      else if constexpr (kSame<T, Float16>)
        added = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, bias + j));
      else
        added = from_bf16(_mm256_maskz_loadu_epi16(valid, bias + j));
      __builtin_prefetch(bias + j + kKeys);  // of the block to come
      _mm512_store_ps(s + j, _mm512_fmadd_ps(added, log2e, x));
    }
  }

  // modify_row where the bias can be read as it lies; false if it cannot.
  bool modify_directly(int r, int64_t j0, int from, int to, float* s) const {
    const Tensor& t = f.modifiers.bias;
    if (f.p.softcap != 0 || t.stride[3] != 1 || t.dtype == DType::kFloat64) return false;
    // Keys without a slot are out of sight: any finite number will do.
    const BiasSlots& slots = f.modifiers.slots;
    const int64_t i = query(r), column = slots.column(i, j0 + from);
    const int64_t at = b * t.stride[0] + head(r) * t.stride[1] + slots.row(i) * t.stride[2] + column;
    const int64_t begin = slots.begin(column), end = slots.end(column, f.Nk - j0 - from);
    const float scale = f.scale * kLog2ef;
    if (t.dtype == DType::kFloat32)
      modify_direct(to - from, scale, t.as<float>() + at, begin, end, s + from);
    else if (t.dtype == DType::kFloat16)
      modify_direct(to - from, scale, t.as<Float16>() + at, begin, end, s + from);
    else
      modify_direct(to - from, scale, t.as<bf16>() + at, begin, end, s + from);
    return true;
  }

  // outer * tanh(x / (2 log2 e)) = outer - 2 outer / (2^x + 1). What counts of a score is its absolute error, so small ones
  // need no formula of their own.
  static HK_INLINE __m512 capped(__m512 x, __m512 outer) {
    const __m512 two = _mm512_set1_ps(2.f);
    const __m512 y = _mm512_add_ps(exp2(VecF(_mm512_min_ps(_mm512_set1_ps(100.f), x))), _mm512_set1_ps(1.f));
    __m512 inverse = _mm512_rcp14_ps(y);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(y, inverse, two));
    return _mm512_mul_ps(outer, _mm512_fnmadd_ps(two, inverse, _mm512_set1_ps(1.f)));
  }

  // Scores of row r for the keys [j0 + from, j0 + to): scaled, capped, in base 2, with what is added.
  void modify_row(int r, int64_t j0, int from, int to, float* s) const {
    const bool own = f.modifiers.bias && !f.shared_row;  // a row of its own is added
    if (own && modify_directly(r, j0, from, to, s)) return;
    if (own) {
      const int64_t n = f.Nk - j0 < to ? f.Nk - j0 : to;
      f.modifiers.additive_row(b, head(r), query(r), j0 + from, n - from, m.add + from);
    }
    const bool adds = own || (f.modifiers.additive && f.shared_row);
    const float cap = static_cast<float>(f.p.softcap);
    const float doubled = 2 * kLog2ef * f.scale / cap;  // of a score: the exponent of e^2x
    const __m512 inner = _mm512_set1_ps(cap != 0 ? doubled : f.scale * kLog2ef), outer = _mm512_set1_ps(cap * kLog2ef);
    for (int j = from; j < to; j += 16) {
      __m512 x = _mm512_mul_ps(_mm512_load_ps(s + j), inner);
      if (cap != 0) x = capped(x, outer);
      if (adds) x = _mm512_add_ps(x, _mm512_load_ps(m.add + j));  // at key j0
      _mm512_store_ps(s + j, x);
    }
  }

  // What mask and padding show of the keys [j0 + from, j0 + to) to the rows [r0, r1) of a strip.
  void load_seen(int r0, int r1, int64_t j0, int from, int to) const {
    uint32_t real[kWords];
    for (int w = from / 32; w < to / 32; ++w) real[w] = padding_bits(f.modifiers, b, j0 + w * 32, f.Nk - j0 - w * 32);
    for (int r = r0; r < r1; ++r)
      for (int w = from / 32; w < to / 32; ++w)
        m.seen[(r - r0) * kWords + w] =
            real[w] & mask_bits(f.modifiers, b, head(r), query(r), j0 + w * 32, f.Nk - j0 - w * 32);
  }

  int strip_row(int r) const { return f.narrow ? r % kNarrowStrip : r % kStrip; }
  const float* score_row(int r) const { return m.s + strip_row(r) * f.score_stride; }

  // Row r against the keys [j0 + from, j0 + to), multiples of 32 from j0.
  struct Span {
    int from, to, lo, hi;  // lo, hi: what the row sees, from j0
    const uint32_t* seen;  // of it, what mask and padding show; null: all
    bool whole() const { return lo <= from && hi >= to && !seen; }
    __mmask32 visible(int j) const {
      return first_lanes32(hi - j) & ~first_lanes32(lo - j) & (seen ? seen[j / 32] : ~0u);
    }
  };
  Span span(int r, int64_t j0, int from, int to) const {
    return {from, to, m.lo[r] - static_cast<int>(j0), m.hi[r] - static_cast<int>(j0),
            f.hides ? m.seen + r % kStrip * kWords : nullptr};
  }

  // The largest visible scores, lane by lane; -inf where there are none.
  static HK_INLINE __m512 lane_tops(const float* s, const Span& x) {
    __m512 a = _mm512_set1_ps(-INFINITY), b = a;
    if (x.whole()) {
      for (int j = x.from; j < x.to; j += 32) {
        a = _mm512_max_ps(a, _mm512_load_ps(s + j));
        b = _mm512_max_ps(b, _mm512_load_ps(s + j + 16));
      }
    } else {
      for (int j = x.from; j < x.to; j += 32) {
        const __mmask32 see = x.visible(j);
        a = _mm512_mask_max_ps(a, static_cast<__mmask16>(see), a, _mm512_load_ps(s + j));
        b = _mm512_mask_max_ps(b, static_cast<__mmask16>(see >> 16), b, _mm512_load_ps(s + j + 16));
      }
    }
    return _mm512_max_ps(a, b);
  }

  // The maxima of the rows [r0, r1), r1 - r0 <= 16, at their first block of keys.
  void first_tops(int r0, int r1, int64_t j0, int from, int to) const {
    alignas(64) float lanes[16 * 16];
    for (int r = r0; r < r1; ++r) {
      _mm512_store_ps(lanes + (r - r0) * 16, lane_tops(score_row(r), span(r, j0, from, to)));
      next.ask(f.steps);
    }
    const __m512 raw = reduce16<Max>(lanes), top = _mm512_mul_ps(raw, _mm512_set1_ps(factor));
    const __mmask16 none = _mm512_cmp_ps_mask(raw, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    _mm512_storeu_ps(m.top + r0, _mm512_mask_mov_ps(top, none, _mm512_set1_ps(kLowest)));
    for (int r = r0; r < r1; ++r) m.limit[r] = none >> (r - r0) & 1 ? -INFINITY : limit_above(m.top[r]);
  }
  // What a score must exceed to raise the maximum `top`.
  float limit_above(float top) const { return factor > 0 ? (top + kSlack) * per_factor : INFINITY; }

  void raise_top(int r, const Span& x) const {
    const __m512 tops = lane_tops(score_row(r), x);
    if (__builtin_expect(_mm512_cmp_ps_mask(tops, _mm512_set1_ps(m.limit[r]), _CMP_GT_OQ) == 0, 1)) return;
    const float top = _mm512_reduce_max_ps(tops) * factor;
    rescale(r, m.top[r] - top);
    m.top[r] = top;
    m.limit[r] = limit_above(top);
  }

  // Numerators of row r: S row -> P row, and their sum, lane by lane.
  void exponentials(int r, int64_t j0, const Span& x, bool first) const {
    const float* s = score_row(r);
    bf16* out = m.prob + strip_row(r) * f.prob_stride;
    const __m512 c = _mm512_set1_ps(factor), top = _mm512_set1_ps(m.top[r]);
    __m512 sum0 = first ? _mm512_setzero_ps() : _mm512_load_ps(m.sum + 16 * r), sum1 = _mm512_setzero_ps();
    const bool dropout = f.modifiers.dropout;
    if (x.whole() && !dropout) {
      for (int j = x.from; j < x.to; j += 32) {
        const __m512 low = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(s + j), c, top));
        const __m512 high = exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(s + j + 16), c, top));
        sum0 = _mm512_add_ps(sum0, low);
        sum1 = _mm512_add_ps(sum1, high);
        _mm512_store_si512(out + j, to_bf16(low, high));
      }
    } else {
      uint32_t kept[kWords];
      for (int j = x.from & ~63; dropout && j < x.to; j += 64) {
        const uint64_t bits = kept_bits(f.modifiers, b, head(r), query(r), j0 + j);
        kept[j / 32] = static_cast<uint32_t>(bits);
        kept[j / 32 + 1] = static_cast<uint32_t>(bits >> 32);
      }
      for (int j = x.from; j < x.to; j += 32) {
        const __mmask32 see = x.visible(j);
        __m512 low = _mm512_maskz_mov_ps(static_cast<__mmask16>(see),
                                         exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(s + j), c, top)));
        __m512 high = _mm512_maskz_mov_ps(static_cast<__mmask16>(see >> 16),
                                          exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(s + j + 16), c, top)));
        sum0 = _mm512_add_ps(sum0, low);
        sum1 = _mm512_add_ps(sum1, high);
        if (dropout) {  // the factor of what is kept is the output's
          low = _mm512_maskz_mov_ps(static_cast<__mmask16>(kept[j / 32]), low);
          high = _mm512_maskz_mov_ps(static_cast<__mmask16>(kept[j / 32] >> 16), high);
        }
        _mm512_store_si512(out + j, to_bf16(low, high));
      }
    }
    _mm512_store_ps(m.sum + 16 * r, _mm512_add_ps(sum0, sum1));
  }

  void softmax_strip(int r0, int r1, int64_t j0, int from, int to, bool first) const {
    if (f.modified)
      for (int r = r0; r < r1; ++r) modify_row(r, j0, from, to, m.s + (r - r0) * kScoreStride);
    if (f.hides) load_seen(r0, r1, j0, from, to);
    for (int r = r0; first && r < r1; r += 16) first_tops(r, r + 16 < r1 ? r + 16 : r1, j0, from, to);
    for (int r = r0; r < r1; ++r) {
      const Span x = span(r, j0, from, to);
      if (!first) raise_top(r, x);
      exponentials(r, j0, x, first);
      next.ask(f.steps);
    }
  }

  // O of the strip += P V over `count` times 32 keys; begin, end: the pairs of keys of the first 32 and of the last
  // outside of which P is 0.
  template <int RT>
  void accumulate_strip(int r0, const bf16* v, const bf16* prob, int count, bool first, int begin = 0, int end = 16) const {
    const int64_t v_block = f.v_steps * 2 * kTile;  // packed elements of 32 keys
    const int columns = (f.Dv + 15) / 16;
    for (int c = 0; c < columns; c += 2) {
      const TileGrid o{m.o + r0 * f.o_stride + c * 16, f.o_stride, 16 * f.o_stride, 16};
      if (c + 1 < columns)
        accumulate<RT, 2>(o, first, prob, f.prob_stride, 16 * f.prob_stride, 32, v + c * kTile, kTile, v_block, count,
                          nullptr, begin, end);
      else
        accumulate<RT, 1>(o, first, prob, f.prob_stride, 16 * f.prob_stride, 32, v + c * kTile, kTile, v_block, count,
                          nullptr, begin, end);
    }
  }

  // One strip of rows against the keys [j0, j0 + kKeys); returns whether any key was seen.
  bool strip(int r0, int64_t j0, const bf16* k, const bf16* v, bool first) const {
    const int r1 = r0 + kStrip < count ? r0 + kStrip : count;
    // Both bounds rise with the row.
    const int64_t lo = m.lo[r0] - j0, hi = m.hi[r1 - 1] - j0;
    const int from = lo <= 0 ? 0 : static_cast<int>(lo & ~31);
    const int to = hi >= kKeys ? kKeys : static_cast<int>((hi + 31) & ~31);
    if (from >= to) return false;
    const int tiles = ((hi >= kKeys ? kKeys : static_cast<int>(hi)) - from + 15) / 16;
    const int64_t a_stride = f.steps * 32;
    for (int r = r0; r < r1; r += 16) {
      const bf16* a = m.q + r * f.steps * 32;
      const bf16* packed = k + from / 16 * f.steps * kTile;
      float* s = m.s + (r - r0) * kScoreStride + from;
      score_tiles(a, a_stride, packed, tiles, f.steps, s, kScoreStride);
    }
    softmax_strip(r0, r1, j0, from, to, first);
    const bf16* values = v + from * f.v_steps * 32;
    if (r1 - r0 > 16)
      accumulate_strip<2>(r0, values, m.prob + from, (to - from) / 32, first);
    else
      accumulate_strip<1>(r0, values, m.prob + from, (to - from) / 32, first);
    return true;
  }

  // What row r of a narrow strip sees of its keys, which begin at `from`: vectors of 16, of which the first and the last
  // may be partly visible.
  struct Vectors {
    int begin, end;
    __mmask16 first, last;
  };
  Vectors vectors(int r, int64_t from) const {
    const int lo = m.lo[r] - static_cast<int>(from), hi = m.hi[r] - static_cast<int>(from);
    if (lo >= hi) return {0, 0, 0, 0};
    const int begin = lo / 16, end = (hi + 15) / 16;
    return {begin, end, static_cast<__mmask16>(~first_lanes16(lo - 16 * begin) & first_lanes16(hi - 16 * begin)),
            first_lanes16(hi - 16 * (end - 1))};
  }

  // first_tops of a narrow strip.
  void narrow_tops(int r0, int r1, const Vectors* seen) const {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    alignas(64) float lanes[16 * 16];
    for (int r = r0; r < r1; ++r) {
      const Vectors& x = seen[r - r0];
      const float* s = score_row(r);
      __m512 a = none, b = none;
      if (x.begin < x.end) {
        a = _mm512_mask_mov_ps(none, x.first, _mm512_load_ps(s + 16 * x.begin));
        for (int i = x.begin + 1; i + 1 < x.end; ++i) b = _mm512_max_ps(b, _mm512_load_ps(s + 16 * i));
        if (x.end - x.begin > 1) a = _mm512_mask_max_ps(a, x.last, a, _mm512_load_ps(s + 16 * (x.end - 1)));
      }
      _mm512_store_ps(lanes + (r - r0) * 16, _mm512_max_ps(a, b));
      next.ask(f.steps);
    }
    const __m512 raw = reduce16<Max>(lanes);
    const __mmask16 empty = _mm512_cmp_ps_mask(raw, none, _CMP_EQ_OQ);
    _mm512_storeu_ps(m.top + r0, _mm512_mask_mov_ps(_mm512_mul_ps(raw, _mm512_set1_ps(factor)), empty, _mm512_set1_ps(kLowest)));
  }

  // Numerators of row r of a narrow strip of `all` vectors, 0 where it sees nothing, and their sum, lane by lane.
  void narrow_exponentials(int r, const Vectors& x, int all) const {
    const float* s = score_row(r);
    bf16* out = m.prob + strip_row(r) * f.prob_stride;
    const __m512 c = _mm512_set1_ps(factor), top = _mm512_set1_ps(m.top[r]);
    const auto put = [&](int i, __m512 y) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 * i), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
      return y;
    };
    const auto numerators = [&](int i) { return exp2_bf16(_mm512_fmsub_ps(_mm512_load_ps(s + 16 * i), c, top)); };
    for (int i = 0; i < x.begin; ++i) put(i, _mm512_setzero_ps());
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    if (x.begin < x.end) {
      sum0 = put(x.begin, _mm512_maskz_mov_ps(x.first, numerators(x.begin)));
      for (int i = x.begin + 1; i + 1 < x.end; ++i) sum1 = _mm512_add_ps(sum1, put(i, numerators(i)));
      if (x.end - x.begin > 1)
        sum0 = _mm512_add_ps(sum0, put(x.end - 1, _mm512_maskz_mov_ps(x.last, numerators(x.end - 1))));
    }
    for (int i = x.end; i < all; ++i) put(i, _mm512_setzero_ps());
    _mm512_store_ps(m.sum + 16 * r, _mm512_add_ps(sum0, sum1));
  }

  // A narrow strip of rows against all its keys; returns whether any was seen. k, v: the packs of the head.
  bool narrow_strip(int r0, const bf16* k, const bf16* v) const {
    const int r1 = r0 + kNarrowStrip < count ? r0 + kNarrowStrip : count;
    const int64_t lo = m.lo[r0], hi = m.hi[r1 - 1], from = lo & ~31, to = (hi + 31) & ~31;
    if (lo >= hi) return false;
    const int keys = static_cast<int>(to - from);
    // What lies in one piece in the ring of packed keys.
    const auto for_each_piece = [&](int64_t begin, int64_t end, auto body) {
      for (int64_t j = begin; j < end;) {
        const int64_t at = j % f.ring, n = end - j < f.ring - at ? end - j : f.ring - at;
        body(at, static_cast<int>(j - from), static_cast<int>(n));
        j += n;
      }
    };
    for_each_piece(lo & ~15, hi, [&](int64_t at, int column, int n) {
      score_tiles(m.q + r0 * f.steps * 32, f.steps * 32, k + at * f.steps * 32, (n + 15) / 16, f.steps, m.s + column,
                  f.score_stride);
    });
    Vectors seen[kNarrowStrip];
    for (int r = r0; r < r1; ++r) seen[r - r0] = vectors(r, from);
    narrow_tops(r0, r1, seen);
    for (int r = r0; r < r1; ++r) {
      narrow_exponentials(r, seen[r - r0], keys / 16);
      next.ask(f.steps);
    }
    // Half of the first 32 keys, and of the last, may be seen by no row.
    const int skip = (lo & 16) / 2, rest = hi % 32 > 0 && hi % 32 <= 16 ? 8 : 16;
    for_each_piece(from, to, [&](int64_t at, int column, int n) {
      accumulate_strip<1>(r0, v + at * f.v_steps * 32, m.prob + column, n / 32, column == 0, column == 0 ? skip : 0,
                          column + n == keys ? rest : 16);
    });
    return true;
  }

  void run_narrow(const bf16* k, const bf16* v) {
    load_rows();
    bool unseen[kRows / 16];
    for (int r0 = 0; r0 < count; r0 += kNarrowStrip) unseen[r0 / 16] = !narrow_strip(r0, k, v);
    next.ask_rest();
    finish(unseen);
  }

  // k, v: the packs of the whole head, or null: packed here.
  void run(const bf16* k, const bf16* v) {
    if (f.narrow) return run_narrow(k, v);
    load_rows();
    bool first[kRows / kStrip];
    for (bool& x : first) x = true;
    const int64_t begin = m.lo[0] / kKeys * kKeys, end = m.hi[count - 1];
    for (int64_t j0 = begin; j0 < end; j0 += kKeys) {
      const bf16 *k_block = m.k, *v_block = m.v;
      if (k) {
        k_block = k + j0 % f.ring * f.steps * 32;
        v_block = v + j0 % f.ring * f.v_steps * 32;
      } else {
        for (int64_t j = j0; j < j0 + kKeys && j < end; j += 32)
          f.pack_keys(b, h, j, m.k + (j - j0) * f.steps * 32, m.v + (j - j0) * f.v_steps * 32);
      }
      if (f.modifiers.additive && f.shared_row)
        f.modifiers.additive_row(b, h * f.G, int64_t{0}, j0, f.Nk - j0 < kKeys ? f.Nk - j0 : kKeys, m.add);
      for (int r0 = 0; r0 < count; r0 += kStrip)
        if (strip(r0, j0, k_block, v_block, first[r0 / kStrip])) first[r0 / kStrip] = false;
    }
    next.ask_rest();
    bool unseen[kRows / 16];
    for (int i = 0; i < kRows / 16; ++i) unseen[i] = first[i / (kStrip / 16)];
    finish(unseen);
  }

  // Sums -> outputs and log-sum-exps; unseen: by 16 rows, no key was seen.
  void finish(const bool* unseen) const {
    const Tensor& out = f.p.out;
    float* lse_to = f.p.lse.as<float>() + (b * f.p.heads() + h * f.G) * f.Nq;
    alignas(64) float inverse[16], lse[16];
    for (int r0 = 0; r0 < count; r0 += 16) {
      const __m512 sum = unseen[r0 / 16] ? _mm512_setzero_ps() : reduce16<Add>(m.sum + 16 * r0);
      const __mmask16 empty = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_EQ_OQ);
      _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(static_cast<float>(f.modifiers.keep_factor)), sum));
      const __m512 y = (_mm512_load_ps(m.top + r0) + log2(VecF(sum))) * kLn2f;
      _mm512_store_ps(lse, _mm512_mask_mov_ps(y, empty, _mm512_set1_ps(-INFINITY)));
      for (int r = r0; r < r0 + 16 && r < count; ++r) {
        const int64_t hq = head(r), i = query(r);
        bf16* to = out.as<bf16>() + b * out.stride[0] + hq * out.stride[1] + i * out.stride[2];
        const float* o = m.o + r * f.o_stride;
        const __m512 scale = _mm512_set1_ps(inverse[r - r0]);
        for (int d = 0; d < f.Dv; d += 32) {
          const __m512i x = empty >> (r - r0) & 1 ? _mm512_setzero_si512()
                                                  : to_bf16(_mm512_mul_ps(scale, _mm512_load_ps(o + d)),
                                                            _mm512_mul_ps(scale, _mm512_load_ps(o + d + 16)));
          if (f.stream)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + d), x);
          else if (f.Dv - d >= 32)
            _mm512_storeu_si512(to + d, x);
          else
            _mm512_mask_storeu_epi16(to + d, first_lanes32(f.Dv - d), x);
        }
        lse_to[(hq - h * f.G) * f.Nq + i] = lse[r - r0];
      }
    }
  }
};

}  // namespace

void attention_forward(const AttentionParams& p) {
  const int64_t threads = omp_get_max_threads();
  const Forward f(p, threads);
  if (f.B * f.Hkv == 0 || f.rows == 0) return;
  advise_huge_pages(p.out.data, p.out.span_bytes());
  const int64_t heads = f.B * f.Hkv;
  const int64_t k_size = f.ring * f.steps * 32, v_size = f.ring * f.v_steps * 32;
  // If no thread packs for itself, all threads do for all, in waves that fit a buffer.
  int64_t wave = heads;
  char* packs = nullptr;
  if (f.share) {
    const int64_t bytes = 2 * (k_size + v_size);
    wave = kSharedPackBytes / (bytes > 0 ? bytes : 1);
    wave = wave < 1 ? 1 : wave > heads ? heads : wave;
    if (f.own) wave = threads;
    packs = thread_scratch(ScratchUse::kShared, wave * bytes);
  }
  bf16* const k_packs = reinterpret_cast<bf16*>(packs);
  bf16* const v_packs = k_packs ? k_packs + wave * k_size : nullptr;
#pragma omp parallel
  {
    const Forward::Buffers buffers = f.allocate();
    const ProductSession session;
    if (!f.share) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head)
        Task(f, buffers, head / f.Hkv, head % f.Hkv, 0).run(nullptr, nullptr);
    } else if (f.own) {
      bf16* const k_pack = k_packs + omp_get_thread_num() * k_size;
      bf16* const v_pack = v_packs + omp_get_thread_num() * v_size;
#pragma omp for schedule(dynamic, 1)
      for (int64_t head = 0; head < heads; ++head) {
        int64_t packed = 0;
        for (int64_t block = 0; block < f.blocks; ++block) {
          if (const int64_t first = f.first_key(block); packed < first) packed = first;
          for (const int64_t end = f.end_key(block); packed < end; packed += 32)
            f.pack_keys(head / f.Hkv, head % f.Hkv, packed, k_pack + packed % f.ring * f.steps * 32,
                        v_pack + packed % f.ring * f.v_steps * 32);
          Task(f, buffers, head / f.Hkv, head % f.Hkv, block).run(k_pack, v_pack);
        }
      }
    } else {
      for (int64_t first = 0; first < heads; first += wave) {
        const int64_t n = heads - first < wave ? heads - first : wave, chunks = (f.Nk + 31) / 32;
#pragma omp for schedule(static)
        for (int64_t c = 0; c < n * chunks; ++c) {
          const int64_t head = first + c / chunks, j0 = c % chunks * 32;
          f.pack_keys(head / f.Hkv, head % f.Hkv, j0, k_packs + c / chunks * k_size + j0 * f.steps * 32,
                      v_packs + c / chunks * v_size + j0 * f.v_steps * 32);
        }
        // A head at a time, so that its packs stay in cache; its last rows, which see most keys, first.
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < n * f.blocks; ++t) {
          const int64_t head = first + t / f.blocks;
          Task(f, buffers, head / f.Hkv, head % f.Hkv, f.blocks - 1 - t % f.blocks)
              .run(k_packs + t / f.blocks * k_size, v_packs + t / f.blocks * v_size);
        }
      }
    }
    _mm_sfence();  // streamed stores become visible to the thread that goes on
  }
}

}  // namespace hierkernels::HK_ISA

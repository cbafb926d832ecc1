// The best blocks of many queries at once: a lane is a query, a list is n vectors of scores and of indices, the best
// score first. Nothing branches on a single query.
#pragma once
#include "../simd.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class F>
HK_INLINE Mask<F> load_lanes(const typename Simd<F>::Signed* p) {
  Mask<F> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class F>
HK_INLINE void store_lanes(typename Simd<F>::Signed* p, Mask<F> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class F>
HK_INLINE Mask<F> set1_lanes(int64_t x) {
  return static_cast<typename Simd<F>::Signed>(x) - Mask<F>{};
}

// Whether a lane of a is greater; never where a is NaN.
HK_INLINE bool any_greater(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  int found = 0;
  for (int i = 0; i < kWidth<float>; ++i) found |= a[i] > b[i];
  return found != 0;
#endif
}
HK_INLINE bool any_greater(VecD a, VecD b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ)) != 0;
#else
  int found = 0;
  for (int i = 0; i < kWidth<double>; ++i) found |= a[i] > b[i];
  return found != 0;
#endif
}

// The lists of kWidth queries: n vectors each, `stride` elements from one to the next.
template <class F>
struct TopBlocks {
  using Index = typename Simd<F>::Signed;
  F* scores;
  Index* blocks;
  int64_t stride;
  int n;

  void load_lists() const {}
  void store_lists() const {}

  void clear() const {
    for (int k = 0; k < n; ++k) {
      store(scores + k * stride, set1(-static_cast<F>(__builtin_inff())));
      store_lanes<F>(blocks + k * stride, set1_lanes<F>(-1));
    }
  }

  // The score that a block must exceed.
  HK_INLINE Vec<F> last() const { return load(scores + (n - 1) * stride); }

  // Puts the block into each list whose last score it exceeds, behind equal ones: these came first, they are lower.
  HK_INLINE void insert(Vec<F> score, int64_t block) const {
    const Mask<F> index = set1_lanes<F>(block);
    Vec<F> here = last();
    Mask<F> here_index = load_lanes<F>(blocks + (n - 1) * stride);
    Mask<F> beats = score > here;
    for (int k = n - 1; k > 0; --k) {
      const Vec<F> above = load(scores + (k - 1) * stride);
      const Mask<F> above_index = load_lanes<F>(blocks + (k - 1) * stride);
      const Mask<F> beats_above = score > above;
      store(scores + k * stride, select(beats_above, above, select(beats, score, here)));
      store_lanes<F>(blocks + k * stride, select(beats_above, above_index, select(beats, index, here_index)));
      here = above;
      here_index = above_index;
      beats = beats_above;
    }
    store(scores, select(beats, score, here));
    store_lanes<F>(blocks, select(beats, index, here_index));
  }

  // Whether a lane has a block whose score does not exceed its bound.
  bool has_within(Vec<F> bound) const {
    Mask<F> found{};
    for (int k = 0; k < n; ++k)
      found |= (load_lanes<F>(blocks + k * stride) >= 0) & ~(load(scores + k * stride) > bound);
    return any_greater(select(found, set1(F(1)), zero<F>()), zero<F>());
  }

  // Drops the blocks whose score does not exceed the lane's threshold.
  void drop(Vec<F> threshold) const {
    for (int k = 0; k < n; ++k) {
      const Mask<F> kept = load(scores + k * stride) > threshold;
      store_lanes<F>(blocks + k * stride, select(kept, load_lanes<F>(blocks + k * stride), set1_lanes<F>(-1)));
    }
  }

  // Ascending indices, -1s last: Batcher's odd-even merge sort, for any n.
  void sort() const {
    for (int p = 1; p < n; p *= 2)
      for (int k = p; k >= 1; k /= 2)
        for (int j = k % p; j + k < n; j += 2 * k)
          for (int i = j; i < j + k && i + k < n; ++i)
            if (i / (2 * p) == (i + k) / (2 * p)) exchange(i, i + k);
  }

 private:
  HK_INLINE void exchange(int first, int second) const {
    using U = typename Simd<F>::U;
    const U a = bit_cast<U>(load_lanes<F>(blocks + first * stride));
    const U b = bit_cast<U>(load_lanes<F>(blocks + second * stride));
    store_lanes<F>(blocks + first * stride, bit_cast<Mask<F>>(a < b ? a : b));
    store_lanes<F>(blocks + second * stride, bit_cast<Mask<F>>(a < b ? b : a));
  }
};

// Short lists, in registers between load_lists() and store_lists().
template <class F, int kMost>
class ShortTopBlocks {
 public:
  explicit ShortTopBlocks(const TopBlocks<F>& list) : list_(list) {}

  HK_INLINE void load_lists() {
#pragma GCC unroll 8
    for (int k = 0; k < kMost; ++k) {
      const bool has = k < list_.n;
      scores_[k] = has ? load(list_.scores + k * list_.stride) : set1(-static_cast<F>(__builtin_inff()));
      blocks_[k] = has ? load_lanes<F>(list_.blocks + k * list_.stride) : set1_lanes<F>(-1);
    }
  }
  HK_INLINE void store_lists() const {
#pragma GCC unroll 8
    for (int k = 0; k < kMost; ++k)
      if (k < list_.n) {
        store(list_.scores + k * list_.stride, scores_[k]);
        store_lanes<F>(list_.blocks + k * list_.stride, blocks_[k]);
      }
  }
  HK_INLINE Vec<F> last() const { return scores_[kMost - 1]; }
  HK_INLINE void insert(Vec<F> score, int64_t block) {
    const Mask<F> index = set1_lanes<F>(block);
    Mask<F> beats = score > scores_[kMost - 1];
#pragma GCC unroll 8
    for (int k = kMost - 1; k > 0; --k) {
      const Mask<F> beats_above = score > scores_[k - 1];
      blocks_[k] = select(beats_above, blocks_[k - 1], select(beats, index, blocks_[k]));
      scores_[k] = max(scores_[k], min(score, scores_[k - 1]));
      beats = beats_above;
    }
    blocks_[0] = select(beats, index, blocks_[0]);
    scores_[0] = max(scores_[0], score);
  }

 private:
  const TopBlocks<F>& list_;
  Vec<F> scores_[kMost];
  Mask<F> blocks_[kMost];
};

// body(list) with the list of `list` kept where insertions are fastest.
template <class F, class Body>
HK_INLINE void with_list(const TopBlocks<F>& list, Body body) {
  if (list.n <= 4) {
    ShortTopBlocks<F, 4> lists(list);
    body(lists);
  } else if (list.n <= 8) {
    ShortTopBlocks<F, 8> lists(list);
    body(lists);
  } else {
    body(list);
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

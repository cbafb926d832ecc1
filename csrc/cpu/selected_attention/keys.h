// Keys and values as the products read them. A tile is W keys, channel by channel: out of it a product takes W columns
// of scores. Every key is visited many times, so the tiles of a whole head are made once (a wave of heads at a time),
// unless the queries are so few that they visit less than there is: then each visit makes its own.
#pragma once
#include <omp.h>

#include "../scratch.h"
#include "operands.h"
#include "selected_attention.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// A tensor (B, Hkv, Nk, C): its tiles, its rows, or both.
template <class E>
class KeySide {
  using O = Operands<E>;
  using F = typename O::Sum;

 public:
  // factor: of the tiles. tiles, rows: what the products read.
  KeySide(const Tensor& t, const Storage<F>& storage, F factor, bool tiles, bool rows)
      : t_(t),
        storage_(storage),
        factor_(factor),
        dim_(static_cast<int>(t.size[3])),
        padded_(O::padded(dim_)),
        in_place_(O::in_place(storage) && dim_ == padded_),
        keys_(round_up(t.size[2], kWidth<F>)) {
    tiles_size_ = tiles ? keys_ / kWidth<F> * tile_size() : 0;
    rows_size_ = rows && !in_place_ ? keys_ / O::kTerms * padded_ : 0;
  }

  int dim() const { return dim_; }
  int padded() const { return padded_; }
  bool in_place() const { return in_place_; }
  int64_t tile_size() const { return O::tile_size(dim_); }
  int64_t size() const { return tiles_size_ + rows_size_; }  // of a head's copy
  Rows head(int64_t b, int64_t h) const { return rows_of(t_, storage_, b, h, 1); }

  // Copies the keys [first, first + n) of a head to `copy`; first is a multiple of W.
  void prepare(E* copy, int64_t b, int64_t h, int64_t first, int n) const {
    if (tiles_size_) make_tiles(b, h, first, n, copy + first / kWidth<F> * tile_size());
    if (rows_size_) make_rows(b, h, first, n, copy + tiles_size_ + first / O::kTerms * padded_);
  }
  const E* tile(const E* copy, int64_t tile) const { return copy + tile * tile_size(); }
  // The row of a key (of a pair: the row with it), and the distance of rows.
  const E* row(const E* copy, const Rows& rows, int64_t key) const {
    return in_place_ ? reinterpret_cast<const E*>(rows.data) + key * rows.token_stride
                     : copy + tiles_size_ + key / O::kTerms * padded_;
  }
  int64_t row_stride() const { return in_place_ ? t_.stride[2] : padded_; }

  // One visit's own tiles and rows.
  void make_tiles(int64_t b, int64_t h, int64_t key, int n, E* to) const {
    O::make_tiles(storage_, head(b, h), key, n, dim_, factor_, to);
  }
  void make_rows(int64_t b, int64_t h, int64_t key, int n, E* to) const {
    O::make_rows(storage_, head(b, h), key, n, dim_, to);
  }

 private:
  const Tensor& t_;
  const Storage<F>& storage_;
  F factor_;
  int dim_, padded_;
  bool in_place_;
  int64_t keys_, tiles_size_, rows_size_;
};

// (batch, kv head) pairs whose copies are in memory at the same time.
inline int64_t pairs_at_once(int64_t pairs, int64_t bytes_of_pair) {
  constexpr int64_t kBudget = int64_t{64} << 20;
  const int64_t most = bytes_of_pair > 0 ? kBudget / bytes_of_pair : pairs;
  const int64_t threads = omp_get_max_threads();
  const int64_t least = threads < 4 ? threads : 4;
  const int64_t at_once = most < least ? least : most;
  return at_once < pairs ? at_once : pairs;
}

// In a parallel region: copies of the heads of `count` pairs from `first` on, each `size` numbers long; ends with a
// barrier.
template <class E, int kSides>
void prepare_pairs(const KeySide<E>* const (&sides)[kSides], int64_t kv_heads, int64_t n_keys, int64_t first,
                   int64_t count, E* copies, int64_t size) {
  constexpr int kPart = 512;  // keys of a task, a multiple of every W
  const int64_t parts = (n_keys + kPart - 1) / kPart;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < count * parts; ++task) {
    const int64_t pair = task / parts, key = task % parts * kPart, left = n_keys - key;
    E* copy = copies + pair * size;
    for (const KeySide<E>* side : sides) {
      side->prepare(copy, (first + pair) / kv_heads, (first + pair) % kv_heads, key,
                    left < kPart ? static_cast<int>(left) : kPart);
      copy += side->size();
    }
  }
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

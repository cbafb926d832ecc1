// Which keys the rows of a tile see, and the shape of tiles. Rows are packed: row r is query r / group of head
// r % group, so that heads which share keys and values share tiles, too.
#pragma once
#include "../../common/key_range.h"
#include "../simd.h"
#include "products.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Tiles of rows x keys: scores, two operands and the accumulators stay in the second-level cache, which is larger
// on machines with AVX-512. Multiples of 64 keys, so that tiles begin where a call of the dropout generator does.
#if defined(__AVX512F__)
constexpr int kTileRows = 192, kTileKeys = 192;
#else
constexpr int kTileRows = 96, kTileKeys = 128;
#endif
// The forward takes all keys of a block of rows at once if they are not more than these: then nothing is rescaled.
constexpr int kMostTileKeys = 2 * kTileKeys;
// Rows of a tile in the backward: two operands of the products over rows then fit the first-level cache.
constexpr int kBackwardRows = 128;
constexpr int kKeyAlignment = 64;
static_assert(kTileKeys % kKeyAlignment == 0);

template <class F>
constexpr int kPanel = kMaxColumns * kWidth<F>;

struct Span {
  int begin, end;
  int size() const { return end - begin; }
};

// A block of packed rows and the keys they see; then one tile of it at a time.
struct TileRows {
  int64_t first = -1;  // packed row
  int n = 0;
  int64_t keys_begin, keys_end;  // the union over all rows, begin <= end

  int64_t query[kTileRows];  // of each row
  int head[kTileRows];       // in the group
  int64_t lo[kTileRows], hi[kTileRows];

  // In the current tile, relative to its first key: row r sees [from[r], to[r]) if from < to. Monotone in r.
  int64_t key = -1;
  int n_keys = 0;
  int from[kTileRows], to[kTileRows];

  void set_rows(const KeyRange& range, int64_t first_row, int rows, int64_t group, int64_t n_keys_total) {
    if (first == first_row && n == rows) return;
    first = first_row;
    n = rows;
    key = -1;
    int64_t i = group == 1 ? first : first / group, h = group == 1 ? 0 : first % group;
    for (int r = 0; r < n; ++r) {
      query[r] = i;
      head[r] = static_cast<int>(h);
      const bool again = r > 0 && query[r - 1] == i;
      lo[r] = again ? lo[r - 1] : range.lo.at(i, n_keys_total);
      hi[r] = again ? hi[r - 1] : range.hi.at(i, n_keys_total);
      if (++h == group) {
        h = 0;
        ++i;
      }
    }
    keys_begin = lo[0] / kKeyAlignment * kKeyAlignment;
    keys_end = hi[n - 1] > keys_begin ? hi[n - 1] : keys_begin;
  }

  void set_keys(int64_t first_key, int keys) {
    if (key == first_key && n_keys == keys) return;
    key = first_key;
    n_keys = keys;
    for (int r = 0; r < n; ++r) {
      from[r] = clamp(lo[r] - key);
      to[r] = clamp(hi[r] - key);
    }
  }

  // The keys that rows [r, r + rows) touch in the tile.
  Span touched(int r, int rows) const { return {from[r], to[r + rows - 1]}; }

  // The probabilities of row r that a product may read: those of all rows that may share a block with it, and those
  // of all keys that may share a block with one it sees. Zeros outside [from, to). In whole vectors of `width`.
  Span readable(int r, int width) const {
    const int before = r < kMostRows ? 0 : r - kMostRows + 1;
    const int after = r + kMostRows > n ? n - 1 : r + kMostRows - 1;
    int begin = from[r] - kMostRows + 1, end = to[r] + kMostRows - 1;
    if (from[before] < begin) begin = from[before];
    if (to[after] > end) end = to[after];
    if (begin < 0) begin = 0;
    if (end > n_keys) end = n_keys;
    return {begin / width * width, (end + width - 1) / width * width};
  }

 private:
  int clamp(int64_t x) const { return x < 0 ? 0 : x < n_keys ? static_cast<int>(x) : n_keys; }
};

// The row blocks of a (batch, kv head).
struct RowBlocks {
  int64_t rows;  // queries * group
  int size;      // rows of a block, but for the last

  int64_t count() const { return (rows + size - 1) / size; }
  int64_t first(int64_t block) const { return block * size; }
  int rows_of(int64_t block) const {
    const int64_t left = rows - block * size;
    return left < size ? static_cast<int>(left) : size;
  }
};

// scores[r * stride + key] = a(row r) . panels(key), for the columns that each group of rows touches. The products
// leave the memory idle: prefetch(r, from, to) is called for the parts of rows to ask for what the row pass reads.
template <class F, class Prefetch>
void multiply_scores(const TileRows& tile, const F* a, int64_t a_stride, const F* panels, int panel, int dim, F* scores,
                     int64_t stride, NextInputs& next, Prefetch prefetch) {
  constexpr int W = kWidth<F>;
  for (int begin = 0; begin < tile.n_keys; begin += panel) {
    const auto first = [&](int key) { return key / W * W < begin ? begin : key / W * W; };
    const auto last = [&](int key) { return round_up(key, W) > begin + panel ? begin + panel : round_up(key, W); };
    for (int r = 0, rows; r < tile.n; r += rows) {
      int from = first(tile.from[r]), to = last(tile.to[r]);
      if (from >= to) {
        rows = 1;
        continue;
      }
      // Rows that touch the same vectors, cut evenly; or, where an edge moves faster, a few that touch more.
      constexpr int kFewRows = 4;
      int columns = (to - from) / W;
      const int most = kMaxRows[columns];
      for (rows = 1; rows < 2 * most && r + rows < tile.n; ++rows)
        if (first(tile.from[r + rows]) != from || last(tile.to[r + rows]) != to) break;
      rows = rows == 2 * most ? most : rows > most ? (rows + 1) / 2 : rows;
      for (; rows < kFewRows && r + rows < tile.n; ++rows) {
        const int ends = last(tile.to[r + rows]), wider = (ends - from) / W;
        if (first(tile.from[r + rows]) >= ends || rows >= kMaxRows[wider]) break;
        to = ends;
        columns = wider;
      }
      for (int i = r; i < r + rows; ++i) prefetch(i, from, to < tile.n_keys ? to : tile.n_keys);
      const F* x = panels + static_cast<int64_t>(begin) * dim + (from - begin);
      multiply<F, false>(rows, columns,
                         {a + r * a_stride, a_stride, x, panel, dim,
                          {scores + r * stride + from, stride, Update::kStore}, next.take(dim, x)});
    }
  }
}

// out(row r) = update(out(row r), sum over keys of weights[r * stride + key] * x(key)). Unless it adds, rows that touch
// no key become zero.
template <class F>
void multiply_rows(const TileRows& tile, const F* weights, int64_t stride, const F* x, int64_t x_stride, int dim,
                   const Target<F>& out, NextInputs& next) {
  constexpr int W = kWidth<F>;
  const bool adds = out.update == Update::kAdd || out.update == Update::kRescale;
  for_each_part((dim + W - 1) / W, kMaxColumns, [&](int column, int columns) {
    for_each_part(tile.n, kMaxRows[columns], [&](int r, int rows) {
      const Span keys = tile.touched(r, rows);
      if (keys.size() <= 0 && adds) return;
      const int64_t terms = keys.size() < 0 ? 0 : keys.size();
      multiply<F, false>(rows, columns,
                         {weights + r * stride + keys.begin, stride, x + keys.begin * x_stride + column * W, x_stride,
                          terms,
                          {out.data + r * out.stride + column * W, out.stride, out.update,
                           out.factors ? out.factors + r : nullptr, out.past_caches},
                          next.take(terms, x)});
    });
  });
}

// out(key j) = update(out(key j), sum over rows of weights[r * stride + j] * x(row r)). Unless it adds, keys that no row
// sees become zero.
template <class F>
void multiply_keys(const TileRows& tile, const F* weights, int64_t stride, const F* x, int64_t x_stride, int dim,
                   const Target<F>& out, NextInputs& next) {
  constexpr int W = kWidth<F>;
  for_each_part((dim + W - 1) / W, kMaxColumns, [&](int column, int columns) {
    int begin = 0, end = 0;  // the rows that see the keys: both grow with the key
    for_each_part(tile.n_keys, kMaxRows[columns], [&](int j, int keys) {
      while (begin < tile.n && tile.to[begin] <= j) ++begin;
      while (end < tile.n && tile.from[end] < j + keys) ++end;
      if (begin >= end && out.update == Update::kAdd) return;
      const int64_t terms = end < begin ? 0 : end - begin;
      multiply<F, true>(keys, columns,
                        {weights + begin * stride + j, stride, x + begin * x_stride + column * W, x_stride, terms,
                         {out.data + j * out.stride + column * W, out.stride, out.update, nullptr, out.past_caches},
                         next.take(terms, x)});
    });
  });
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

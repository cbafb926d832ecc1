// What products multiply: numbers of F here; pair_operands.h has pairs of bfloat16, the products of which are summed in
// float32. A tile is kWidth keys, channel by channel; rows are keys or queries, one after the other.
#pragma once
#include "../attention/storage.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class E>
struct Operands {
  using Sum = E;
  static constexpr int kTerms = 1;  // of a sum, in one operand
  static constexpr int W = kWidth<Sum>;

  static HK_INLINE Vec<E> vector(const E* p) { return load(p); }
  static HK_INLINE Vec<E> broadcast(const E* p) { return set1(*p); }
  static HK_INLINE Vec<E> add_product(Vec<E> a, Vec<E> b, Vec<E> sum) { return fma(a, b, sum); }

  static int padded(int dim) { return round_up(dim, W); }  // channels of a row
  static int terms(int n) { return n; }
  static int64_t tile_size(int dim) { return static_cast<int64_t>(W) * dim; }
  // Whether rows of a tensor are operands as they are.
  static bool in_place(const Storage<Sum>& storage) { return storage.native; }
  // The factor of the keys in tiles is theirs; of pairs, it is that of the scores.
  static constexpr bool kTilesHaveFactor = true;

  static void make_tiles(const Storage<Sum>& storage, const Rows& rows, int64_t first, int n, int dim, Sum factor, E* to) {
    storage.transpose(rows, first, n, dim, factor, to, W);
  }
  // Rows for sums over rows: `padded` apart.
  static void make_rows(const Storage<Sum>& storage, const Rows& rows, int64_t first, int n, int dim, E* to) {
    storage.load(rows, first, n, dim, to, padded(dim));
  }
  // Rows for sums over channels: row_stride() apart.
  static int row_stride(int dim) { return padded(dim); }
  static void load_rows(const Storage<Sum>& storage, const Rows& rows, int64_t first, int n, int dim, E* to) {
    storage.load(rows, first, n, dim, to, row_stride(dim));
  }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

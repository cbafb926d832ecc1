// Where a (query, key) pair is in the bias. Ordinarily at (i, j); a bias by slots repeats with the buckets of `width`
// queries, and its columns count the keys from `before` in front of the bucket: (i % width, j - i / width * width + before).
#pragma once
#include "attention.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

struct BiasSlots {
  int64_t width = 0, before = 0, count = 0;  // width 0: an ordinary bias

  explicit operator bool() const { return width != 0; }
  static BiasSlots from(const AttentionParams& p) { return {p.bias_width, p.bias_before, p.bias.size[3]}; }

  int64_t row(int64_t i) const { return width ? i % width : i; }
  int64_t column(int64_t i, int64_t j) const { return width ? j - (i - i % width) + before : j; }
  // Of n columns from `column` on, those in [begin, end) are in the bias.
  int64_t begin(int64_t column) const { return width && column < 0 ? -column : 0; }
  int64_t end(int64_t column, int64_t n) const { return width && count - column < n ? count - column : n; }
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

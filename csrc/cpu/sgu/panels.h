// Blocks of the weight, and how they and the tokens meet in a product: what an engine is.
//
// An engine multiplies panels of kPanel rows with strips of kStrip columns, kUnit terms at a time:
//   Element      what panels and strips hold; Sum: what results hold
//   kBlockRows   rows of a block; kStepTerms: terms of a step, at least kBlockRows. The panels of one step stay in the
//                second-level cache, a strip of a step in the first.
//   strip_size(rows)              elements of a strip of so many rows (terms)
//   panel_size()                  elements from one panel of a step to the next
//   rows_to_strips(lines, count, row, strips, size)    kGroup rows of `count` columns into strips
//   rows_to_panel_strip(x, stride, rows, count, out)   the transpose of up to kStrip rows as one strip of `count` terms
//   pack_weight(weight, h, transposed, block, out)     a block of the weight, 0 above the diagonal
//   multiply(rows, panel, strip, terms, c, c_stride, update, ahead)    may store whole panels of rows; meanwhile it may
//                ask for what lies at `ahead`, unless that is null: one of kAskParts parts of a strip of so many terms (0: it
//                never asks)
//   Session      lives while a thread multiplies
// The weight's gradient has rows of dmix as panels. An engine with kTiledGradient writes them where dmix is computed
// (rows_to_tiles), the other packs them from strips (strips_to_panels).
#pragma once
#include "columns.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Rows row .. row + rows of a bucket, terms first .. first + terms.
struct WeightBlock {
  int64_t row, rows, first, terms;
  int64_t column;  // of the weight: that of the bucket's first token
  bool own;        // terms and rows are of one bucket: only terms <= row are not 0 (transposed: terms >= row)
};

// The strip (from its first term on) that the products after these read; none if null.
template <class Engine>
class NextStrip {
 public:
  using E = typename Engine::Element;
  NextStrip(const E* strip, int64_t terms) : strip_(strip), size_(terms * Engine::kStrip / max_of(kParts, 1)) {}
  // What the n-th product asks for.
  const E* part(int64_t n) const { return strip_ && n < kParts ? strip_ + n * size_ : nullptr; }

 private:
  static constexpr int64_t kParts = Engine::kAskParts;
  const E* strip_;
  int64_t size_;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

// Short sequences are bound by memory, and each is a page or less, at whose end the hardware's prefetching stops. While
// one is computed, the inputs of the next are asked for: a line in each turn of a product's loop, because the few
// buffers that wait for memory fill up if many lines are asked for at once.
#pragma once
#include "attention.h"
#include "products.h"
#include "storage.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

class NextInputs {
 public:
  // Aims at the rows of `inputs` that belong to the (batch, kv head) after this one; at nothing behind the last, and
  // for long sequences.
  template <class F, int kInputs>
  HK_INLINE void aim(const AttentionParams& p, const Storage<F>& storage, const Tensor* const (&inputs)[kInputs],
                     int64_t b, int64_t kv_head) {
    static_assert(kInputs <= kMost);
    part_ = n_parts_ = 0;
    head_ = column_ = row_ = 0;
    if (p.n_keys() > kMostRows || p.n_queries() * p.group() > kMostRows) return;
    if (++kv_head == p.kv_heads()) {
      kv_head = 0;
      if (++b == p.batch()) return;
    }
    for (const Tensor* t : inputs) {
      const int64_t group = t->size[1] / p.kv_heads(), n = t->size[2], bytes = t->size[3] * storage.bytes;
      const Rows rows = rows_of(*t, storage, b, kv_head, group);
      const int64_t stride = rows.uniform_stride(n) * storage.bytes;
      Part& part = parts_[n_parts_++];
      part = {rows.data, rows.head_stride * storage.bytes, rows.token_stride * storage.bytes, group, n, lines(bytes)};
      if (stride == bytes)
        part = {rows.data, 0, kLine, 1, lines(group * n * bytes), 1};
      else if (stride)
        part = {rows.data, 0, stride, 1, group * n, lines(bytes)};
    }
  }

  // What to ask for in a loop of so many turns; `otherwise`, which is in the caches, if nothing is left.
  HK_INLINE Lines take(int64_t turns, const void* otherwise) {
    if (part_ == n_parts_) return {static_cast<const char*>(otherwise), 0};
    const Part& part = parts_[part_];
    const Lines next = {part.data + head_ * part.head_stride + column_ * kLine + row_ * part.row_stride,
                        part.row_stride};
    row_ += turns;
    if (row_ >= part.rows) next_column();
    return next;
  }

  // Asks for all that is left.
  HK_INLINE void take_rest() {
    for (; part_ < n_parts_; next_column()) {
      const Part& part = parts_[part_];
      const char* column = part.data + head_ * part.head_stride + column_ * kLine;
      for (; row_ < part.rows; ++row_) __builtin_prefetch(column + row_ * part.row_stride, 0, 2);
    }
  }

 private:
  static constexpr int kLine = 64, kMost = 4, kMostRows = 96;

  // Columns of lines, one after the other.
  struct Part {
    const char* data;
    int64_t head_stride, row_stride;  // in bytes
    int64_t heads, rows, columns;
  };

  static int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine; }
  HK_INLINE void next_column() {
    const Part& part = parts_[part_];
    row_ = 0;
    if (++column_ < part.columns) return;
    column_ = 0;
    if (++head_ < part.heads) return;
    head_ = 0;
    ++part_;
  }

  Part parts_[kMost];
  int n_parts_ = 0, part_ = 0;
  int64_t head_ = 0, column_ = 0, row_ = 0;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

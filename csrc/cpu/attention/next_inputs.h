// Short sequences and narrow windows are bound by memory, and come in runs of a page or a few, at whose end the hardware's
// prefetching stops. While one is computed, the inputs of the next are asked for: a few lines here and there between the
// computations, because the few buffers that wait for memory fill up if many lines are asked for at once.
#pragma once
#include "../simd.h"
#include "attention.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Lines of memory, `step` bytes apart.
struct Lines {
  const char* at;
  int64_t step;
};

// The same line again and again, one that is in the caches.
HK_INLINE Lines nothing_to_ask(const void* cached) { return {static_cast<const char*>(cached), 0}; }

class NextInputs {
 public:
  // Aims at the rows of `inputs` that belong to the (batch, kv head) after this one; at nothing behind the last, and
  // for long sequences.
  template <int kInputs>
  HK_INLINE void aim(const AttentionParams& p, const Tensor* const (&inputs)[kInputs], int64_t b, int64_t kv_head) {
    if (++kv_head == p.kv_heads()) {
      kv_head = 0;
      ++b;
    }
    aim_at(p, inputs, b, kv_head);
  }

  // Aims at the rows of `inputs` of this (batch, kv head); at nothing if the batch has no such entry, and for long
  // sequences.
  template <int kInputs>
  HK_INLINE void aim_at(const AttentionParams& p, const Tensor* const (&inputs)[kInputs], int64_t b, int64_t kv_head) {
    static_assert(kInputs <= kMost);
    part_ = n_parts_ = 0;
    head_ = column_ = row_ = 0;
    if (p.n_keys() > kMostRows || p.n_queries() * p.group() > kMostRows || b >= p.batch()) return;
    for (const Tensor* t : inputs) {
      const int64_t bytes = t->element_bytes(), row = t->size[3] * bytes;
      const int64_t group = t->size[1] / p.kv_heads(), n = t->size[2];
      const int64_t head_step = t->stride[1] * bytes, token_step = t->stride[2] * bytes;
      const char* data = t->as<char>() + b * t->stride[0] * bytes + kv_head * group * head_step;
      const bool dense = token_step == row && (group == 1 || head_step == n * row);
      parts_[n_parts_++] = dense ? Part{data, 0, kLine, 1, lines(group * n * row), 1}
                                 : Part{data, head_step, token_step, group, n, lines(row)};
    }
  }

  // Aims at `n` rows of `row` bytes in each of `heads` heads, or at nothing.
  HK_INLINE void aim(const char* data, int64_t head_step, int64_t token_step, int64_t heads, int64_t n, int64_t row) {
    part_ = 0;
    head_ = column_ = row_ = 0;
    n_parts_ = 1;
    parts_[0] = token_step == row ? Part{data, head_step, kLine, heads, lines(n * row), 1}
                                  : Part{data, head_step, token_step, heads, n, lines(row)};
  }
  HK_INLINE void aim_at_nothing() {
    part_ = n_parts_ = 0;
    head_ = column_ = row_ = 0;
  }
  // After that, aims at the tokens [first, end) of `heads` heads of the batch entry b of each input, too.
  template <int kInputs>
  HK_INLINE void also(const Tensor* const (&inputs)[kInputs], int64_t b, int64_t head, int64_t heads, int64_t first,
                      int64_t end) {
    if (first >= end) return;
    for (const Tensor* t : inputs) {
      const int64_t bytes = t->element_bytes(), row = t->size[3] * bytes;
      const int64_t head_step = t->stride[1] * bytes, token_step = t->stride[2] * bytes;
      const char* data = t->as<char>() + (b * t->stride[0] + head * t->stride[1] + first * t->stride[2]) * bytes;
      parts_[n_parts_++] = token_step == row ? Part{data, head_step, kLine, heads, lines((end - first) * row), 1}
                                             : Part{data, head_step, token_step, heads, end - first, lines(row)};
    }
  }

  // What a loop of so many turns should ask for, a line each; `otherwise`, which is in the caches, if nothing is left.
  HK_INLINE Lines take(int64_t turns, const void* otherwise) {
    if (part_ == n_parts_) return nothing_to_ask(otherwise);
    const Part& part = parts_[part_];
    const Lines next = {part.data + head_ * part.head_step + column_ * kLine + row_ * part.row_step, part.row_step};
    row_ += turns;
    if (row_ >= part.rows) next_column();
    return next;
  }

  // Asks for so many lines.
  HK_INLINE void ask(int64_t count) {
    while (count > 0 && part_ < n_parts_) {
      const Part& part = parts_[part_];
      const char* column = part.data + head_ * part.head_step + column_ * kLine;
      for (; count > 0 && row_ < part.rows; --count, ++row_) __builtin_prefetch(column + row_ * part.row_step, 0, 2);
      if (row_ == part.rows) next_column();
    }
  }
  HK_INLINE void ask_rest() { ask(INT64_MAX); }

 private:
  static constexpr int kLine = 64, kMost = 5, kMostRows = 128;

  // Columns of lines, one after the other.
  struct Part {
    const char* data;
    int64_t head_step, row_step;  // in bytes
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

  Part parts_[kMost] = {};
  int n_parts_ = 0, part_ = 0;
  int64_t head_ = 0, column_ = 0, row_ = 0;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

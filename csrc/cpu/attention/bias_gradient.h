// The gradient of an additive bias: a sum over its broadcast dimensions, the same from run to run.
//
// A task is a key/value head of a batch entry. Where no two tasks share an element of the bias, they add to it
// directly, or store where each element belongs to one (query, key) pair; else each thread, which takes the same tasks every time, adds to a copy of its own, and the copies
// are added in order at the end.
#pragma once
#include "../scratch.h"
#include "../simd.h"
#include "attention.h"
#include "bias_slots.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class F>
class BiasGradient {
 public:
  BiasGradient(const AttentionParams& p, int threads)
      : t_(p.dbias), slots_(BiasSlots::from(p)), once_(p.dbias && p.bias_of_pairs()), n_keys_(p.n_keys()), copies_(1) {
    if (!t_) return;
    size_ = 1;
    for (int d = 0; d < 4; ++d) size_ *= t_.size[d];
    const bool shared = (p.batch() > 1 && t_.stride[0] == 0) || (p.kv_heads() > 1 && t_.stride[1] == 0);
    if (!shared || threads == 1) return;
    copies_ = threads;
    copies_data_ = reinterpret_cast<F*>(thread_scratch(ScratchUse::kBias, static_cast<size_t>(size_) * copies_ * sizeof(F)));
#pragma omp parallel for schedule(static)
    for (int c = 0; c < copies_; ++c) memset(copies_data_ + c * size_, 0, static_cast<size_t>(size_) * sizeof(F));
  }

  // The sums of a thread.
  F* of_thread(int thread) const { return copies_ > 1 ? copies_data_ + thread * size_ : t_.as<F>(); }

  // Before the rows' sums: zeros for the keys outside [lo, hi), if nobody else writes them.
  void begin_row(F* sums, int64_t b, int64_t h, int64_t i, int64_t lo, int64_t hi) const {
    if (!once_) return;
    F* to = sums + b * t_.stride[0] + h * t_.stride[1] + i * t_.stride[2];
    if (lo > hi) lo = hi;
    memset(to, 0, static_cast<size_t>(lo) * sizeof(F));
    memset(to + hi, 0, static_cast<size_t>(n_keys_ - hi) * sizeof(F));
  }

  // A row of sums whose elements are contiguous: those of the keys j0 .. j0 + n are at [0, n), of which [begin, end) are
  // in the bias.
  struct Row {
    F* at;
    int64_t begin, end;
  };
  bool contiguous() const { return t_.stride[3] != 0; }
  bool once() const { return once_; }  // nothing is added to an element: it is stored
  Row row(F* sums, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n) const {
    F* to = sums + b * t_.stride[0] + h * t_.stride[1] + slots_.row(i) * t_.stride[2];
    const int64_t column = slots_.column(i, j0);
    return {to + column, slots_.begin(column), slots_.end(column, n)};
  }

  // sums[b, h, i, j0 .. j0 + n) += row.
  void add_row(F* sums, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n, const F* row) const {
    F* to = sums + b * t_.stride[0] + h * t_.stride[1] + slots_.row(i) * t_.stride[2];
    const int64_t column = slots_.column(i, j0), begin = slots_.begin(column), end = slots_.end(column, n);
    if (t_.stride[3] == 0) {
      F sum = 0;
      for (int64_t j = begin; j < end; ++j) sum += row[j];
      *to = once_ ? sum : *to + sum;
      return;
    }
    to += column;  // contiguous
    if (once_)
      memcpy(to + begin, row + begin, static_cast<size_t>(end - begin) * sizeof(F));
    else
      for (int64_t j = begin; j < end; ++j) to[j] += row[j];
  }

  // After all tasks, outside of the parallel region.
  void finish() const {
    if (copies_ == 1) return;
    F* to = t_.as<F>();
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size_; ++i)
      for (int c = 0; c < copies_; ++c) to[i] += copies_data_[c * size_ + i];
  }

 private:
  Tensor t_;
  BiasSlots slots_;
  bool once_;
  int64_t n_keys_;
  int copies_;
  int64_t size_ = 0;
  F* copies_data_ = nullptr;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

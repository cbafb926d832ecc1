// Which keys a query visits: the blocks named for it, each once, cut at the query's position and the last key.
#pragma once
#include "../simd.h"
#include "selected_attention.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

struct Visit {
  int64_t block, key;  // the block's number and first key
  int64_t keys;        // that are visible, at least 1
  int64_t slot;        // where it is named; `named` for the own block that is not
};

// Walks over the visits of one query after another; one for each thread.
class VisitWalker {
 public:
  // `seen` has a place for each block.
  VisitWalker(const SelectedParams& p, int32_t* seen) : p_(p), seen_(seen), blocks_(p.blocks()), named_(p.named()) {
    for (int64_t j = 0; j < blocks_; ++j) seen_[j] = 0;
  }

  // visit(v) for each block of query i, by the choice `head` (of Hkv or Hq), in the order they are named.
  template <class Body>
  HK_INLINE void walk(int64_t b, int64_t head, int64_t i, Body visit) {
    next_stamp();
    const int64_t position = p_.position(i), keys = p_.n_keys();
    // The keys before `end` are visible.
    const int64_t end = p_.is_causal && position + 1 < keys ? position + 1 : keys;
    const Tensor& t = p_.indices;
    const int64_t* index = t.as<int64_t>() + b * t.stride[0] + head * t.stride[1] + i * t.stride[2];
    const auto take = [&](int64_t block, int64_t slot) {
      if (seen_[block] == stamp_) return;
      seen_[block] = stamp_;
      const int64_t key = block * p_.block_size, left = end - key;
      if (left > 0) visit(Visit{block, key, left < p_.block_size ? left : p_.block_size, slot});
    };
    for (int64_t slot = 0; slot < named_; ++slot, index += t.stride[3])
      if (*index >= 0 && *index < blocks_) take(*index, slot);
    if (p_.include_own_block && position >= 0) take(position / p_.block_size, named_);
  }

 private:
  void next_stamp() {
    if (++stamp_ != INT32_MAX) return;
    for (int64_t j = 0; j < blocks_; ++j) seen_[j] = 0;
    stamp_ = 1;
  }

  const SelectedParams& p_;
  int32_t* seen_;  // the stamp of the last query that a block was named for
  int32_t stamp_ = 0;
  int64_t blocks_, named_;
};

// The weight of a visit, 1 without weights.
template <class F>
HK_INLINE F weight_of(const SelectedParams& p, int64_t b, int64_t head, int64_t i, int64_t slot) {
  if (!p.weights || slot == p.named()) return F(1);
  const Tensor& t = p.weights;
  return t.as<F>()[b * t.stride[0] + head * t.stride[1] + i * t.stride[2] + slot * t.stride[3]];
}

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

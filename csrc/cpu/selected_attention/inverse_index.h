// Which queries visit a block: the visits of a range of queries, sorted by block (counting sort, so that the queries of
// a block keep their order and every sum over them is the same each time).
#pragma once
#include "visits.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

struct Visitor {
  int32_t item;  // (query - first query) * choices + choice
  int32_t slot;  // where the query names the block
};

class InverseIndex {
 public:
  // Numbers of int64_t that begins() needs, and visitors at most, for a range of queries.
  static int64_t begins_size(const SelectedParams& p) { return p.blocks() + 2; }
  static int64_t visitors_size(const SelectedParams& p, int64_t queries) {
    return queries * p.choices() * (p.named() + (p.include_own_block ? 1 : 0));
  }

  InverseIndex(const SelectedParams& p, int64_t* begins, Visitor* visitors)
      : p_(p), begins_(begins), visitors_(visitors) {}

  void build(VisitWalker& walker, int64_t b, int64_t kv_head, int64_t first, int64_t queries) {
    const int64_t choices = p_.choices(), size = begins_size(p_);
    const auto for_each_item = [&](auto body) {
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t c = 0; c < choices; ++c)
          walker.walk(b, kv_head * choices + c, first + i,
                      [&](const Visit& v) { body(v, static_cast<int32_t>(i * choices + c)); });
    };
    for (int64_t j = 0; j < size; ++j) begins_[j] = 0;
    for_each_item([&](const Visit& v, int32_t) { ++begins_[v.block + 2]; });
    for (int64_t j = 2; j < size; ++j) begins_[j] += begins_[j - 1];
    // begins[j + 1] walks from the first to past the last visitor of block j, where block j + 1 begins.
    for_each_item([&](const Visit& v, int32_t item) {
      visitors_[begins_[v.block + 1]++] = {item, static_cast<int32_t>(v.slot)};
    });
  }

  int64_t count(int64_t block) const { return begins_[block + 1] - begins_[block]; }
  const Visitor* visitors(int64_t block) const { return visitors_ + begins_[block]; }

 private:
  const SelectedParams& p_;
  int64_t* begins_;
  Visitor* visitors_;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

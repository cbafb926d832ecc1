// The entry points of one instruction set.
#pragma once
#include "backward.inl"
#include "forward.inl"

namespace hierkernels {
namespace HK_ISA {
namespace {

// The extent of a tensor in memory, if it is dense enough for advice to make sense.
inline void advise_output(const Tensor& t, int element) {
  int64_t count = 1, last = 0;
  for (int d = 0; d < t.ndim; ++d) {
    count *= t.size[d];
    last += (t.size[d] - 1) * t.stride[d];
  }
  if (count > 0 && last + 1 == count) advise_huge_pages(t.data, static_cast<size_t>(count) * element);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
  with_storage(p.q.dtype, [&]<class F>(const Storage<F>& storage) {
    advise_output(p.out, storage.bytes);
    Forward<F>(p, storage).run();
  });
}

void attention_backward(const AttentionParams& p) {
  with_storage(p.q.dtype, [&]<class F>(const Storage<F>& storage) {
    for (const Tensor* t : {&p.dq, &p.dk, &p.dv}) advise_output(*t, storage.bytes);
    Backward<F>(p, storage).run();
  });
}

}  // namespace HK_ISA
}  // namespace hierkernels

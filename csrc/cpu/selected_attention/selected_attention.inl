// The entry points of one instruction set.
#pragma once
#include "backward.inl"
#include "forward.inl"

namespace hierkernels {
namespace HK_ISA {

void selected_forward(const SelectedParams& p) {
  with_storage(p.q.dtype, [&]<class F>(const Storage<F>& storage) { SelectedForward<F>(p, storage).run(); });
}

void selected_backward(const SelectedParams& p) {
  with_storage(p.q.dtype, [&]<class F>(const Storage<F>& storage) { SelectedBackward<F>(p, storage).run(); });
}

}  // namespace HK_ISA
}  // namespace hierkernels

// bfloat16, by dot products of pairs. Machines with AMX run it, too: the few rows of a visit would leave tiles empty.
#define HK_ISA avx512bf16
#include "pair_operands.h"

#include "backward.inl"
#include "forward.inl"

namespace hierkernels {
namespace HK_ISA {
namespace {

constexpr Storage<float> kStorage = storage_of<float, BFloat16>();

}  // namespace

void selected_forward(const SelectedParams& p) { SelectedForward<Pair>(p, kStorage).run(); }
void selected_backward(const SelectedParams& p) { SelectedBackward<Pair>(p, kStorage).run(); }

}  // namespace HK_ISA
}  // namespace hierkernels

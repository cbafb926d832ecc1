// What the files that bind kernels to Python share. Tensors come as Python objects.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/attention_params.h"
#include "common/select_params.h"
#include "common/selected_params.h"
#include "common/sgu_params.h"
#include "common/tensor.h"

namespace hierkernels {

// Asks PyTorch how its tensors are read: called once, when the module is loaded.
void find_exchange();

// The torch.Tensor t as kernels see it; an empty one for None. Throws a Python error if it cannot be.
Tensor tensor(const pybind11::object& t);

// A call from the arguments of AttentionCall.arguments(), in hierkernels/ops/attention/call.py.
AttentionParams attention_params(const pybind11::object& q, const pybind11::object& k, const pybind11::object& v,
                                 const pybind11::object& bias, const pybind11::object& mask,
                                 const pybind11::object& padding, const pybind11::object& seed,
                                 const std::array<int64_t, 10>& key_range, double scale, double softcap, double dropout_p,
                                 int64_t bias_width, int64_t bias_before);

// A call of selected attention from SelectedCall.arguments(), but for what it writes.
SelectedParams selected_params(const pybind11::object& q, const pybind11::object& k, const pybind11::object& v,
                               const pybind11::object& indices, const pybind11::object& weights, int64_t block_size,
                               bool include_own_block, bool is_causal, double scale);

// A call of block selection, but for what it writes; blocks: num_blocks, windows_per_block, chunks_per_window, first_chunk,
// block_size, query_offset, num_selected, num_initial, num_local.
SelectParams select_params(const pybind11::object& q, const pybind11::object& k, const pybind11::object& lse, int64_t heads,
                           const std::array<int64_t, 5>& visible, const std::array<int64_t, 5>& candidates,
                           const std::array<int64_t, 9>& blocks, bool exclude_own_block, double scale);

// A call of the spatial gating unit, but for what it writes.
SguParams sgu_params(const pybind11::object& residual, const pybind11::object& gate, const pybind11::object& weight,
                     const pybind11::object& bias, const pybind11::object& gate_residual, int64_t window, int activation);

// Called with every tensor that is bound, if set: the tests' emulation then knows what kernels may touch.
extern void (*tensor_observer)(const Tensor& t);

#if defined(HIERKERNELS_CUDA) || defined(HIERKERNELS_CUDA_EMULATION)
void bind_cuda(pybind11::module_& m);
#endif

}  // namespace hierkernels

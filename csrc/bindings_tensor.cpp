// Tensors from PyTorch's, by DLPack; no torch header.
#include <string>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace hierkernels {

void (*tensor_observer)(const Tensor& t) = nullptr;

namespace {

// How a PyTorch tensor is asked for its address, type, sizes and strides: a tenth of the time of its Python methods.
struct Exchange {
  PyTypeObject* tensor_class;
  decltype(dlpack::ExchangeApi::view) view;
} exchange;

DType dtype_of(dlpack::DataType t) {
  struct Known {
    DType dtype;
    uint8_t code, bits;
  };
  static constexpr Known kKnown[] = {{DType::kFloat32, 2, 32}, {DType::kFloat64, 2, 64}, {DType::kBFloat16, 4, 16},
                                     {DType::kFloat16, 2, 16}, {DType::kBool, 6, 8},     {DType::kInt64, 0, 64}};
  for (const Known& known : kKnown)
    if (known.code == t.code && known.bits == t.bits && t.lanes == 1) return known.dtype;
  throw py::type_error("kernels know no tensors of " + std::to_string(t.bits) + " bits of DLPack's type " + std::to_string(t.code));
}

}  // namespace

void find_exchange() {
  const py::object tensor_class = py::module_::import("torch").attr("Tensor");
  const py::object capsule = tensor_class.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->major != 1 || !api->view) throw py::import_error("this PyTorch describes its tensors in a way unknown here");
  exchange = {reinterpret_cast<PyTypeObject*>(tensor_class.inc_ref().ptr()), api->view};
}

Tensor tensor(const py::object& t) {
  Tensor out;
  if (t.is_none()) return out;
  if (!PyObject_TypeCheck(t.ptr(), exchange.tensor_class)) throw py::type_error("a torch.Tensor expected");
  dlpack::TensorView view;
  if (exchange.view(t.ptr(), &view) != 0) throw py::error_already_set();
  if (view.ndim > 4) throw py::value_error("at most 4 dimensions");
  out.data = static_cast<char*>(view.data) + view.byte_offset;
  out.dtype = dtype_of(view.dtype);
  out.ndim = view.ndim;
  for (int d = 0; d < view.ndim; ++d) {
    out.size[d] = view.shape[d];
    out.stride[d] = view.strides[d];
  }
  if (tensor_observer) tensor_observer(out);
  return out;
}

AttentionParams attention_params(const py::object& q, const py::object& k, const py::object& v,
                                 const py::object& bias, const py::object& mask,
                                 const py::object& padding, const py::object& seed,
                                 const std::array<int64_t, 10>& r, double scale, double softcap, double dropout_p,
                                 int64_t bias_width, int64_t bias_before) {
  AttentionParams p;
  p.q = tensor(q);
  p.k = tensor(k);
  p.v = tensor(v);
  p.bias = tensor(bias).broadcast();
  p.mask = tensor(mask).broadcast();
  p.padding = tensor(padding).broadcast();
  p.range = {{r[0], r[1], r[2], r[3], r[4]}, {r[5], r[6], r[7], r[8], r[9]}};
  p.scale = scale;
  p.softcap = softcap;
  p.dropout_p = dropout_p;
  p.bias_width = bias_width;
  p.bias_before = bias_before;
  if (!seed.is_none()) p.seed_at = tensor(seed).as<int64_t>();
  return p;
}

SelectedParams selected_params(const py::object& q, const py::object& k, const py::object& v, const py::object& indices,
                               const py::object& weights, int64_t block_size, bool include_own_block, bool is_causal,
                               double scale) {
  SelectedParams p;
  p.q = tensor(q);
  p.k = tensor(k);
  p.v = tensor(v);
  p.indices = tensor(indices);
  p.weights = tensor(weights);
  p.block_size = block_size;
  p.include_own_block = include_own_block;
  p.is_causal = is_causal;
  p.scale = scale;
  return p;
}

SelectParams select_params(const py::object& q, const py::object& k, const py::object& lse, int64_t heads,
                           const std::array<int64_t, 5>& visible, const std::array<int64_t, 5>& candidates,
                           const std::array<int64_t, 9>& blocks, bool exclude_own_block, double scale) {
  const auto staircase = [](const std::array<int64_t, 5>& s) { return Staircase{s[0], s[1], s[2], s[3], s[4]}; };
  SelectParams p;
  p.q = tensor(q);
  p.k = tensor(k);
  p.lse = tensor(lse);
  p.heads = heads;
  p.merged = p.q.size[1] / heads;
  p.visible = staircase(visible);
  p.candidates = staircase(candidates);
  p.num_blocks = blocks[0];
  p.windows_per_block = blocks[1];
  p.chunks_per_window = blocks[2];
  p.first_chunk = blocks[3];
  p.block_size = blocks[4];
  p.query_offset = blocks[5];
  p.num_selected = blocks[6];
  p.num_initial = blocks[7];
  p.num_local = blocks[8];
  p.exclude_own_block = exclude_own_block;
  p.scale = scale;
  return p;
}

SguParams sgu_params(const py::object& residual, const py::object& gate, const py::object& weight, const py::object& bias,
                     const py::object& gate_residual, int64_t window, int activation) {
  SguParams p;
  p.residual = tensor(residual);
  p.gate = tensor(gate);
  p.weight = tensor(weight);
  p.bias = tensor(bias);
  p.gate_residual = tensor(gate_residual);
  p.window = window;
  p.activation = static_cast<Activation>(activation);
  return p;
}

}  // namespace hierkernels

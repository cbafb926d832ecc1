// Tensors from Python objects with torch's interface; no torch header.
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace hierkernels {

void (*tensor_observer)(const Tensor& t) = nullptr;

namespace {

PyObject* g_dtypes[6] = {};  // torch's dtype objects, in the order of DType

DType dtype_of(const py::object& dtype) {
  for (int i = 0; i < 6; ++i)
    if (g_dtypes[i] == dtype.ptr()) return static_cast<DType>(i);
  throw py::type_error("unsupported dtype " + std::string(py::str(dtype)));
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// The integers of a tuple, at most 4; returns how many.
int integers(const py::object& tuple, int64_t* out) {
  const Py_ssize_t count = PyTuple_Check(tuple.ptr()) ? PyTuple_GET_SIZE(tuple.ptr()) : 5;
  if (count > 4) throw py::value_error("at most 4 dimensions");
  for (Py_ssize_t d = 0; d < count; ++d) {
    out[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), d));
    if (out[d] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return static_cast<int>(count);
}

}  // namespace

void bind_dtypes(py::module_& m) {
  m.def("set_dtypes", [](const py::tuple& dtypes) {
    if (dtypes.size() != 6) throw py::value_error("6 dtypes expected");
    for (int i = 0; i < 6; ++i) g_dtypes[i] = py::object(dtypes[i]).release().ptr();
  });
}

Tensor tensor(const py::object& t) {
  Tensor out;
  if (t.is_none()) return out;
  // Interned names, and Python's own functions where pybind11 would look at types first: a call is
  // made of microseconds.
  static PyObject* const kDataPtr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const kDtype = PyUnicode_InternFromString("dtype");
  static PyObject* const kShape = PyUnicode_InternFromString("shape");
  static PyObject* const kStride = PyUnicode_InternFromString("stride");
  out.data = PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(t.ptr(), kDataPtr)).ptr());
  if (!out.data && PyErr_Occurred()) throw py::error_already_set();
  out.dtype = dtype_of(checked(PyObject_GetAttr(t.ptr(), kDtype)));
  out.ndim = integers(checked(PyObject_GetAttr(t.ptr(), kShape)), out.size);
  integers(checked(PyObject_CallMethodNoArgs(t.ptr(), kStride)), out.stride);
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

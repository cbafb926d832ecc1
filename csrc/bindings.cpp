// The Python module hierkernels._native. Tensors come as Python objects with torch's interface; no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cpu/attention/attention.h"
#include "cpu/isa.h"
#include "cpu/selected_attention/selected_attention.h"
#include "cpu/sgu/sgu.h"
#if defined(HIERKERNELS_CUDA)
#include "cuda/launch.h"
#endif

namespace py = pybind11;
using hierkernels::AttentionParams;
using hierkernels::DType;
using hierkernels::SelectedParams;
using hierkernels::SguParams;
using hierkernels::Tensor;

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
  return out;
}

AttentionParams params(const py::object& q, const py::object& k, const py::object& v, const py::object& bias,
                       const py::object& mask, const py::object& padding, const py::object& seed,
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
  if (!seed.is_none()) p.seed = static_cast<uint64_t>(*tensor(seed).as<int64_t>());
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

SguParams sgu_params(const py::object& residual, const py::object& gate, const py::object& weight, const py::object& bias,
                     const py::object& gate_residual, int64_t window, int activation) {
  SguParams p;
  p.residual = tensor(residual);
  p.gate = tensor(gate);
  p.weight = tensor(weight);
  p.bias = tensor(bias);
  p.gate_residual = tensor(gate_residual);
  p.window = window;
  p.activation = static_cast<hierkernels::Activation>(activation);
  return p;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of hierkernels.";
  m.def("set_dtypes", [](const py::tuple& dtypes) {
    if (dtypes.size() != 6) throw py::value_error("6 dtypes expected");
    for (int i = 0; i < 6; ++i) g_dtypes[i] = py::object(dtypes[i]).release().ptr();
  });

  m.def("cpu_isa", [] { return hierkernels::isa_name(hierkernels::active_isa()); });
  m.def("set_cpu_isa", [](const std::string& name) {
    if (!hierkernels::set_isa(name.c_str()))
      throw py::value_error("no instruction set '" + name + "' on this machine");
  });
  m.def("cpu_isas", [] {
    py::list names;
    for (int i = 0; i <= static_cast<int>(hierkernels::detected_isa()); ++i)
      names.append(hierkernels::isa_name(static_cast<hierkernels::Isa>(i)));
    return names;
  });

  m.def("attention_forward",
        [](const py::object& q, const py::object& k, const py::object& v, const py::object& bias,
           const py::object& mask, const py::object& padding, const py::object& seed,
           const std::array<int64_t, 10>& range, double scale, double softcap, double dropout_p,
           int64_t bias_width, int64_t bias_before, const py::object& out, const py::object& lse) {
          AttentionParams p = params(q, k, v, bias, mask, padding, seed, range, scale, softcap, dropout_p, bias_width, bias_before);
          p.out = tensor(out);
          p.lse = tensor(lse);
          py::gil_scoped_release release;
          hierkernels::attention_forward(p);
        });
  m.def("attention_backward",
        [](const py::object& q, const py::object& k, const py::object& v, const py::object& bias,
           const py::object& mask, const py::object& padding, const py::object& seed,
           const std::array<int64_t, 10>& range, double scale, double softcap, double dropout_p,
           int64_t bias_width, int64_t bias_before, const py::object& out, const py::object& lse, const py::object& dout, const py::object& dlse,
           const py::object& dq, const py::object& dk, const py::object& dv, const py::object& dbias) {
          AttentionParams p = params(q, k, v, bias, mask, padding, seed, range, scale, softcap, dropout_p, bias_width, bias_before);
          p.out = tensor(out);
          p.lse = tensor(lse);
          p.dout = tensor(dout);
          p.dlse = tensor(dlse);
          p.dq = tensor(dq);
          p.dk = tensor(dk);
          p.dv = tensor(dv);
          p.dbias = tensor(dbias).broadcast();
          py::gil_scoped_release release;
          hierkernels::attention_backward(p);
        });

  m.def("selected_forward",
        [](const py::object& q, const py::object& k, const py::object& v, const py::object& indices,
           const py::object& weights, int64_t block_size, bool include_own_block, bool is_causal, double scale,
           const py::object& out, const py::object& lse) {
          SelectedParams p = selected_params(q, k, v, indices, weights, block_size, include_own_block, is_causal, scale);
          p.out = tensor(out);
          p.lse = tensor(lse);
          py::gil_scoped_release release;
          hierkernels::selected_forward(p);
        });
  m.def("selected_backward",
        [](const py::object& q, const py::object& k, const py::object& v, const py::object& indices,
           const py::object& weights, int64_t block_size, bool include_own_block, bool is_causal, double scale,
           const py::object& out, const py::object& lse, const py::object& dout, const py::object& dlse,
           const py::object& dq, const py::object& dk, const py::object& dv, const py::object& dweights) {
          SelectedParams p = selected_params(q, k, v, indices, weights, block_size, include_own_block, is_causal, scale);
          p.out = tensor(out);
          p.lse = tensor(lse);
          p.dout = tensor(dout);
          p.dlse = tensor(dlse);
          p.dq = tensor(dq);
          p.dk = tensor(dk);
          p.dv = tensor(dv);
          p.dweights = tensor(dweights);
          py::gil_scoped_release release;
          hierkernels::selected_backward(p);
        });

  m.def("sgu_forward",
        [](const py::object& residual, const py::object& gate, const py::object& weight, const py::object& bias,
           const py::object& gate_residual, int64_t window, int activation, const py::object& out, const py::object& z) {
          SguParams p = sgu_params(residual, gate, weight, bias, gate_residual, window, activation);
          p.out = tensor(out);
          p.z = tensor(z);
          py::gil_scoped_release release;
          hierkernels::sgu_forward(p);
        });
  m.def("sgu_backward",
        [](const py::object& residual, const py::object& gate, const py::object& weight, const py::object& bias,
           const py::object& gate_residual, int64_t window, int activation, const py::object& z, const py::object& dout,
           const py::object& dresidual, const py::object& dgate, const py::object& dweight, const py::object& dbias,
           const py::object& dgate_residual) {
          SguParams p = sgu_params(residual, gate, weight, bias, gate_residual, window, activation);
          p.z = tensor(z);
          p.dout = tensor(dout);
          p.dresidual = tensor(dresidual);
          p.dgate = tensor(dgate);
          p.dweight = tensor(dweight);
          p.dbias = tensor(dbias);
          p.dgate_residual = tensor(dgate_residual);
          py::gil_scoped_release release;
          hierkernels::sgu_backward(p);
        });

#if defined(HIERKERNELS_CUDA)
  m.attr("cuda_version") = hierkernels::cuda::runtime_version();
  m.attr("cuda_kernels") = hierkernels::cuda::kernel_names();
  m.def("cuda_attention_delta", [](const py::object& out, const py::object& dout, const py::object& dlse,
                                   const py::object& delta, uintptr_t stream) {
    hierkernels::cuda::attention_delta(tensor(out), tensor(dout), tensor(dlse), tensor(delta),
                                       reinterpret_cast<void*>(stream));
  });
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_kernels") = "";
#endif
}

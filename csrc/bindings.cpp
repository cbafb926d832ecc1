// The Python module hierkernels._native; no torch header.
#include "bindings.h"

#include <string>

#include "cpu/attention/attention.h"
#include "cpu/isa.h"
#include "cpu/sgu/sgu.h"

namespace py = pybind11;
using hierkernels::attention_params;
using hierkernels::AttentionParams;
using hierkernels::SguParams;
using hierkernels::tensor;

namespace {

// The value of the seed, which is in the CPU's memory.
AttentionParams with_seed(AttentionParams p) {
  if (p.seed_at) p.seed = static_cast<uint64_t>(*p.seed_at);
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
  hierkernels::bind_dtypes(m);

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
          AttentionParams p = with_seed(attention_params(q, k, v, bias, mask, padding, seed, range, scale, softcap,
                                                         dropout_p, bias_width, bias_before));
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
          AttentionParams p = with_seed(attention_params(q, k, v, bias, mask, padding, seed, range, scale, softcap,
                                                         dropout_p, bias_width, bias_before));
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
  hierkernels::bind_cuda(m);
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_kernels") = "";
#endif
}

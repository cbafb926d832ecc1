// The CUDA operators for Python: names start with cuda_, the last argument is the stream's handle.
#include "../bindings.h"

#include "operators.h"

namespace py = pybind11;

namespace hierkernels {
namespace {

void* handle(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void bind_sgu(py::module_& m) {
  m.def("cuda_sgu_forward",
        [](const py::object& residual, const py::object& gate, const py::object& weight, const py::object& bias,
           const py::object& gate_residual, int64_t window, int activation, const py::object& out, const py::object& z,
           uintptr_t stream) {
          SguParams p = sgu_params(residual, gate, weight, bias, gate_residual, window, activation);
          p.out = tensor(out);
          p.z = tensor(z);
          cuda::sgu_forward(p, handle(stream));
        });
  m.def("cuda_sgu_weight_splits",
        [](const py::object& residual, const py::object& gate, const py::object& weight, const py::object& bias,
           const py::object& gate_residual, int64_t window, int activation) {
          return cuda::sgu_weight_splits(sgu_params(residual, gate, weight, bias, gate_residual, window, activation));
        });
  m.def("cuda_sgu_backward",
        [](const py::object& residual, const py::object& gate, const py::object& weight, const py::object& bias,
           const py::object& gate_residual, int64_t window, int activation, const py::object& z, const py::object& dout,
           const py::object& dresidual, const py::object& dgate, const py::object& dweight, const py::object& sums,
           const py::object& dgate_residual, uintptr_t stream) {
          SguParams p = sgu_params(residual, gate, weight, bias, gate_residual, window, activation);
          p.z = tensor(z);
          p.dout = tensor(dout);
          p.dresidual = tensor(dresidual);
          p.dgate = tensor(dgate);
          p.dweight = tensor(dweight);
          p.dgate_residual = tensor(dgate_residual);
          cuda::sgu_backward(p, tensor(sums), handle(stream));
        });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_version") = cuda::runtime_version();
  m.attr("cuda_kernels") = "attention_delta, causal_sgu";  // of the operators that follow, for hierkernels.info
  m.def("cuda_attention_delta", [](const py::object& out, const py::object& dout, const py::object& dlse,
                                   const py::object& delta, uintptr_t stream) {
    cuda::attention_delta(tensor(out), tensor(dout), tensor(dlse), tensor(delta), handle(stream));
  });
  bind_sgu(m);
}

}  // namespace hierkernels

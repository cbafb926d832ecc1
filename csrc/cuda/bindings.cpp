// The CUDA operators for Python: names start with cuda_, the last argument is the stream's handle.
#include "../bindings.h"

#include "operators.h"

namespace py = pybind11;

namespace hierkernels {
namespace {

void* handle(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_version") = cuda::runtime_version();
  m.attr("cuda_kernels") = "attention_delta";  // of the operators that follow, for hierkernels.info
  m.def("cuda_attention_delta", [](const py::object& out, const py::object& dout, const py::object& dlse,
                                   const py::object& delta, uintptr_t stream) {
    cuda::attention_delta(tensor(out), tensor(dout), tensor(dlse), tensor(delta), handle(stream));
  });
}

}  // namespace hierkernels

// The CUDA operators for Python: names start with cuda_, the last argument is the stream's handle.
#include "../bindings.h"

#include "operators.h"

namespace py = pybind11;

namespace hierkernels {
namespace {

using Object = const py::object&;
using Range = const std::array<int64_t, 10>&;

void* handle(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void bind_attention(py::module_& m) {
  m.def("cuda_attention_forward",
        [](Object q, Object k, Object v, Object bias, Object mask, Object padding, Object seed, Range range, double scale,
           double softcap, double dropout_p, int64_t bias_width, int64_t bias_before, Object out, Object lse,
           uintptr_t stream) {
          AttentionParams p = attention_params(q, k, v, bias, mask, padding, seed, range, scale, softcap, dropout_p,
                                               bias_width, bias_before);
          p.out = tensor(out);
          p.lse = tensor(lse);
          cuda::attention_forward(p, handle(stream));
        });
  m.def("cuda_attention_bias_slices",
        [](Object q, Object k, Object v, Object bias, Object mask, Object padding, Object seed, Range range, double scale,
           double softcap, double dropout_p, int64_t bias_width, int64_t bias_before) {
          return cuda::attention_bias_slices(attention_params(q, k, v, bias, mask, padding, seed, range, scale, softcap,
                                                              dropout_p, bias_width, bias_before));
        });
  m.def("cuda_attention_backward",
        [](Object q, Object k, Object v, Object bias, Object mask, Object padding, Object seed, Range range, double scale,
           double softcap, double dropout_p, int64_t bias_width, int64_t bias_before, Object out, Object lse, Object dout,
           Object dlse, Object dq, Object dk, Object dv, Object dbias, Object delta, uintptr_t stream) {
          AttentionParams p = attention_params(q, k, v, bias, mask, padding, seed, range, scale, softcap, dropout_p,
                                               bias_width, bias_before);
          p.out = tensor(out);
          p.lse = tensor(lse);
          p.dout = tensor(dout);
          p.dlse = tensor(dlse);
          p.dq = tensor(dq);
          p.dk = tensor(dk);
          p.dv = tensor(dv);
          p.dbias = tensor(dbias);
          cuda::attention_backward(p, tensor(delta), handle(stream));
        });
}

void bind_sgu(py::module_& m) {
  m.def("cuda_sgu_forward", [](Object residual, Object gate, Object weight, Object bias, Object gate_residual, int64_t window,
                               int activation, Object out, Object z, uintptr_t stream) {
    SguParams p = sgu_params(residual, gate, weight, bias, gate_residual, window, activation);
    p.out = tensor(out);
    p.z = tensor(z);
    cuda::sgu_forward(p, handle(stream));
  });
  m.def("cuda_sgu_weight_splits", [](Object residual, Object gate, Object weight, Object bias, Object gate_residual,
                                     int64_t window, int activation) {
    return cuda::sgu_weight_splits(sgu_params(residual, gate, weight, bias, gate_residual, window, activation));
  });
  m.def("cuda_sgu_backward", [](Object residual, Object gate, Object weight, Object bias, Object gate_residual,
                                int64_t window, int activation, Object z, Object dout, Object dresidual, Object dgate,
                                Object dweight, Object sums, Object dgate_residual, uintptr_t stream) {
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
  m.attr("cuda_kernels") = "attention, causal_sgu";  // the operators that follow, for hierkernels.info
  m.def("cuda_kernel_table", [] {  // (name, threads, bytes of shared memory) of each kernel
    py::list table;
    for (const auto& kernels : {cuda::attention_kernels(), cuda::sgu_kernels()})
      for (const cuda::KernelInfo& k : kernels) table.append(py::make_tuple(k.name, k.threads, k.shared_bytes));
    return table;
  });
  bind_attention(m);
  bind_sgu(m);
}

}  // namespace hierkernels

// The Python module hierkernels._native; no torch header.
#include "bindings.h"

#include <string>

#include "cpu/attention/attention.h"
#include "cpu/gated_sum/gated_sum.h"
#include "cpu/isa.h"
#include "cpu/product/product.h"
#include "cpu/rowwise/rowwise.h"
#include "cpu/select_blocks/select_blocks.h"
#include "cpu/selected_attention/selected_attention.h"
#include "cpu/sgu/sgu.h"
#include "stamp.h"

namespace py = pybind11;
using hierkernels::attention_params;
using hierkernels::AttentionParams;
using hierkernels::select_params;
using hierkernels::selected_params;
using hierkernels::SelectedParams;
using hierkernels::SelectParams;
using hierkernels::sgu_params;
using hierkernels::SguParams;
using hierkernels::tensor;

namespace {

// The value of the seed, which is in the CPU's memory.
AttentionParams with_seed(AttentionParams p) {
  if (p.seed_at) p.seed = static_cast<uint64_t>(*p.seed_at);
  return p;
}

hierkernels::GatedSumParams gated_sum_params(const py::object& gates, const std::array<py::object, 3>& parts) {
  hierkernels::GatedSumParams p;
  p.gates = tensor(gates);
  for (int s = 0; s < hierkernels::kBranches; ++s) p.parts[s] = tensor(parts[s]);
  return p;
}

hierkernels::NormParams norm_params(const py::object& x, const py::object& weight, const py::object& bias, double floor, double addend,
                                    double scale, int64_t shift, int64_t kept, const py::object& inverse, const py::object& mean) {
  hierkernels::NormParams p;
  p.x = tensor(x);
  p.weight = tensor(weight);
  p.bias = tensor(bias);
  p.floor = floor;
  p.addend = addend;
  p.scale = scale;
  p.shift = shift;
  p.kept = kept;
  p.inverse = tensor(inverse);
  p.mean = tensor(mean);
  return p;
}

hierkernels::GeluParams gelu_params(const py::object& x, int64_t form, const py::object& first, const py::object& second) {
  hierkernels::GeluParams p;
  p.x = tensor(x);
  p.form = static_cast<hierkernels::GeluForm>(form);
  p.first = tensor(first);
  p.second = tensor(second);
  return p;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of hierkernels.";
  m.attr("built_from") = hierkernels::built_from();
  hierkernels::find_exchange();

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

  m.def("norm_forward",
        [](const py::object& x, const py::object& weight, const py::object& bias, double floor, double addend, double scale,
           int64_t shift, int64_t kept, const py::object& inverse, const py::object& mean, const py::object& out) {
          hierkernels::NormParams p = norm_params(x, weight, bias, floor, addend, scale, shift, kept, inverse, mean);
          p.out = tensor(out);
          py::gil_scoped_release release;
          hierkernels::norm_forward(p);
        });
  m.def("norm_backward",
        [](const py::object& x, const py::object& weight, const py::object& bias, double floor, double addend, double scale,
           int64_t shift, int64_t kept, const py::object& inverse, const py::object& mean, const py::object& dout,
           const py::object& dx, const py::object& dweight, const py::object& dbias) {
          hierkernels::NormParams p = norm_params(x, weight, bias, floor, addend, scale, shift, kept, inverse, mean);
          p.dout = tensor(dout);
          p.dx = tensor(dx);
          p.dweight = tensor(dweight);
          p.dbias = tensor(dbias);
          py::gil_scoped_release release;
          hierkernels::norm_backward(p);
        });
  m.def("gelu_forward", [](const py::object& x, int64_t form, const py::object& first, const py::object& second) {
    hierkernels::GeluParams p = gelu_params(x, form, first, second);
    py::gil_scoped_release release;
    hierkernels::gelu_forward(p);
  });
  m.def("gelu_backward", [](const py::object& x, int64_t form, const py::object& first, const py::object& second,
                            const py::object& dx) {
    hierkernels::GeluParams p = gelu_params(x, form, first, second);
    p.dx = tensor(dx);
    py::gil_scoped_release release;
    hierkernels::gelu_backward(p);
  });
  m.def("rotary", [](const py::object& x, const py::object& cos, const py::object& sin, bool transposed,
                     const py::object& out) {
    hierkernels::RotaryParams p;
    p.x = tensor(x);
    p.cos = tensor(cos);
    p.sin = tensor(sin);
    p.transposed = transposed;
    p.out = tensor(out);
    py::gil_scoped_release release;
    hierkernels::rotary(p);
  });

  m.def("has_product", &hierkernels::has_product);
  m.def("product", [](const py::object& a, const py::object& b, const py::object& bias, const py::object& addend, bool in_bfloat16,
                      const py::object& out, const py::object& row_sums) {
    hierkernels::ProductParams p;
    p.a = tensor(a);
    p.b = tensor(b);
    p.bias = tensor(bias);
    p.addend = tensor(addend);
    p.in_bfloat16 = in_bfloat16;
    p.out = tensor(out);
    p.row_sums = tensor(row_sums);
    py::gil_scoped_release release;
    hierkernels::product(p);
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

  m.def("select_blocks",
        [](const py::object& q, const py::object& k, const py::object& lse, int64_t heads,
           const std::array<int64_t, 5>& visible, const std::array<int64_t, 5>& candidates,
           const std::array<int64_t, 9>& blocks, bool exclude_own_block, double scale, uintptr_t indices) {
          SelectParams p = select_params(q, k, lse, heads, visible, candidates, blocks, exclude_own_block, scale);
          p.indices = reinterpret_cast<int32_t*>(indices);
          py::gil_scoped_release release;
          hierkernels::select_blocks(p);
        });

  m.def("gated_sum_forward",
        [](const py::object& gates, const std::array<py::object, 3>& parts, const py::object& out) {
          hierkernels::GatedSumParams p = gated_sum_params(gates, parts);
          p.out = tensor(out);
          py::gil_scoped_release release;
          hierkernels::gated_sum_forward(p);
        });
  m.def("gated_sum_backward",
        [](const py::object& gates, const std::array<py::object, 3>& parts, const py::object& dout,
           const py::object& dgates, const std::array<py::object, 3>& dparts) {
          hierkernels::GatedSumParams p = gated_sum_params(gates, parts);
          p.dout = tensor(dout);
          p.dgates = tensor(dgates);
          for (int s = 0; s < hierkernels::kBranches; ++s) p.dparts[s] = tensor(dparts[s]);
          py::gil_scoped_release release;
          hierkernels::gated_sum_backward(p);
        });

#if defined(HIERKERNELS_CUDA)
  hierkernels::bind_cuda(m);
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_kernels") = "";
#endif
}

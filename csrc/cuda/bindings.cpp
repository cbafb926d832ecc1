// The CUDA operators for Python: names start with cuda_, the last argument is the stream's handle.
#include "../bindings.h"

#include <tuple>

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
           Object records, uintptr_t stream) {
          AttentionParams p = attention_params(q, k, v, bias, mask, padding, seed, range, scale, softcap, dropout_p,
                                               bias_width, bias_before);
          p.out = tensor(out);
          p.lse = tensor(lse);
          cuda::attention_forward(p, tensor(records), handle(stream));
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

// A call as SelectedCall.arguments() has it.
using Call = const std::tuple<py::object, py::object, py::object, py::object, py::object, int64_t, bool, bool, double>&;

SelectedParams params(Call call) {
  return std::apply([](const auto&... x) { return selected_params(x...); }, call);
}

void bind_selected(py::module_& m) {
  m.def("cuda_selected_plan", [](Call call) {
    const cuda::SelectedPlan plan = cuda::selected_plan(params(call));
    return py::make_tuple(plan.set_words, plan.visit_words, plan.pairs, plan.blocks, plan.visits, plan.keys, plan.segments);
  });
  m.def("cuda_selected_forward", [](Call call, Object out, Object lse, Object lists, uintptr_t stream) {
    SelectedParams p = params(call);
    p.out = tensor(out);
    p.lse = tensor(lse);
    cuda::selected_forward(p, tensor(lists), handle(stream));
  });
  m.def("cuda_selected_weight_parts", [](Call call) { return cuda::selected_weight_parts(params(call)); });
  m.def("cuda_selected_backward_queries", [](Call call, Object out, Object lse, Object dout, Object dlse, Object dq,
                                             Object dweights, Object lists, Object delta, uintptr_t stream) {
    SelectedParams p = params(call);
    p.out = tensor(out);
    p.lse = tensor(lse);
    p.dout = tensor(dout);
    p.dlse = tensor(dlse);
    p.dq = tensor(dq);
    p.dweights = tensor(dweights);
    cuda::selected_backward_queries(p, tensor(lists), tensor(delta), handle(stream));
  });
  m.def("cuda_selected_count_visits", [](Call call, Object visits, Object counts, uintptr_t stream) {
    cuda::selected_count_visits(params(call), tensor(visits), tensor(counts), handle(stream));
  });
  m.def("cuda_selected_place_visits", [](Call call, Object visits, Object offsets, Object visitors, uintptr_t stream) {
    cuda::selected_place_visits(params(call), tensor(visits), tensor(offsets), tensor(visitors), handle(stream));
  });
  m.def("cuda_selected_backward_keys",
        [](Call call, Object lse, Object dout, Object dk, Object dv, Object delta, Object visitors, Object starts,
           Object item_block, Object first_item, Object first_part, Object parts, int64_t chunk, uintptr_t stream) {
          SelectedParams p = params(call);
          p.lse = tensor(lse);
          p.dout = tensor(dout);
          p.dk = tensor(dk);
          p.dv = tensor(dv);
          cuda::selected_backward_keys(p,
                                       {tensor(visitors), tensor(starts), tensor(item_block), tensor(first_item),
                                        tensor(first_part), tensor(parts), chunk},
                                       tensor(delta), handle(stream));
        });
}

void bind_select_blocks(py::module_& m) {
  m.def("cuda_select_blocks",
        [](Object q, Object k, Object lse, int64_t heads, const std::array<int64_t, 5>& visible,
           const std::array<int64_t, 5>& candidates, const std::array<int64_t, 9>& blocks, bool exclude_own_block,
           double scale, Object indices, uintptr_t stream) {
          cuda::select_blocks(select_params(q, k, lse, heads, visible, candidates, blocks, exclude_own_block, scale),
                              tensor(indices), handle(stream));
        });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_version") = cuda::runtime_version();
  m.attr("cuda_kernels") = "attention, causal_sgu, selected_attention, select_blocks";  // the operators that follow, for hierkernels.info
  m.def("cuda_kernel_table", [] {  // (name, threads, bytes of shared memory) of each kernel
    py::list table;
    for (const auto& kernels : {cuda::attention_kernels(), cuda::sgu_kernels(), cuda::selected_kernels(), cuda::select_kernels()})
      for (const cuda::KernelInfo& k : kernels) table.append(py::make_tuple(k.name, k.threads, k.shared_bytes));
    return table;
  });
  bind_attention(m);
  bind_sgu(m);
  bind_selected(m);
  bind_select_blocks(m);
}

}  // namespace hierkernels

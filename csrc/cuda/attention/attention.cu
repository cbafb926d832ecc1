// The attention operators: from the call's parameters to launches.
#include "../../common/philox.h"
#include "../hopper/attention.h"
#include "../operators.h"
#include "kernels.h"
#include "shapes.h"

namespace hierkernels::cuda {
namespace {

PairTensor pair_tensor(const Tensor& t) {
  return {t.data, {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}};
}

AttentionArgs make_args(const AttentionParams& p) {
  AttentionArgs a{};
  a.q = Rows::of(p.q);
  a.k = Rows::of(p.k);
  a.v = Rows::of(p.v);
  a.out = Rows::of(p.out);
  a.lse = p.lse.as<float>();
  a.range = p.range;
  a.n_queries = static_cast<int>(p.n_queries());
  a.n_keys = static_cast<int>(p.n_keys());
  a.group = static_cast<int>(p.group());
  a.heads = static_cast<int>(p.heads());
  a.kv_heads = static_cast<int>(p.kv_heads());
  a.items = static_cast<int>(p.batch() * p.kv_heads());
  a.rows_per_item = a.n_queries * a.group;
  a.items_per_tile = 1;
  a.scale = static_cast<float>(p.scale);
  a.bias = pair_tensor(p.bias);
  a.mask = pair_tensor(p.mask);
  a.bias_dtype = p.bias.dtype;
  a.bias_width = static_cast<int>(p.bias_width);
  a.bias_before = static_cast<int>(p.bias_before);
  a.padding = p.padding.as<unsigned char>();
  a.padding_stride[0] = p.padding.stride[0];
  a.padding_stride[1] = p.padding.stride[1];
  a.softcap = static_cast<float>(p.softcap);
  a.modified = p.bias || p.mask || p.padding || p.softcap > 0;
  a.dropout_scale = static_cast<float>(1 / (1 - p.dropout_p));
  a.dropout_threshold = dropout_threshold(p.dropout_p);
  a.seed = p.seed_at;
  for (int d = 0; d < 4; ++d) a.bias_size[d] = p.bias.size[d];
  a.slices = 1;
  return a;
}

template <class S>
KernelInfo info(const char* kernel, const std::string& arguments) {
  return {std::string("attention_") + kernel + "_kernel<" + arguments + ">", S::kThreads, S::kShared};
}

template <class T, int kDim>
void add_kernels(std::vector<KernelInfo>& to, const std::string& type) {
  const std::string arguments = type + ", " + std::to_string(kDim);
  to.push_back(info<ForwardShape<T, kDim>>("forward", arguments));
  to.push_back(info<QueryGradientShape<T, kDim>>("query_gradient", arguments));
  to.push_back(info<KeyGradientShape<T, kDim>>("key_gradient", arguments));
}

template <class T>
void add_kernels(std::vector<KernelInfo>& to, const std::string& type) {
  add_kernels<T, 64>(to, type);
  add_kernels<T, 128>(to, type);
  add_kernels<T, 256>(to, type);
  to.push_back(info<BiasGradientShape<T>>("bias_gradient", type));
}

}  // namespace

std::vector<KernelInfo> attention_kernels() {
  std::vector<KernelInfo> kernels{{"attention_delta_kernel", kDeltaThreads, 0}};
  add_kernels<Number16>(kernels, "Number16");
  add_kernels<float>(kernels, "float");
  for (const KernelInfo& k : hopper_attention_kernels()) kernels.push_back(k);
  return kernels;
}

void attention_forward(const AttentionParams& p, void* stream) {
  if (!run_hopper_attention_forward(p, stream)) run_attention_forward(make_args(p), p.q.dtype, stream);
}

int attention_bias_slices(const AttentionParams& p) { return attention_bias_gradient_slices(make_args(p)); }

void attention_backward(const AttentionParams& p, const Tensor& delta, void* stream) {
  run_attention_delta(p.out, p.dout, p.dlse, delta, stream);
  AttentionArgs a = make_args(p);
  a.dout = Rows::of(p.dout);
  a.dq = Rows::of(p.dq);
  a.dk = Rows::of(p.dk);
  a.dv = Rows::of(p.dv);
  a.delta = delta.as<float>();
  if (!run_hopper_query_gradient(p, delta, stream)) run_attention_query_gradient(a, p.q.dtype, stream);
  if (!run_hopper_key_gradient(p, delta, stream)) run_attention_key_gradient(a, p.q.dtype, stream);
  if (!p.dbias) return;
  a.dbias = p.dbias.as<float>();
  a.slices = static_cast<int>(p.dbias.size[0]);
  run_attention_bias_gradient(a, p.q.dtype, stream);
}

}  // namespace hierkernels::cuda

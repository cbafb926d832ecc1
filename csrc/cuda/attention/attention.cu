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
  a.parts = 1;
  for (int d = 0; d < 4; ++d) a.bias_size[d] = p.bias.size[d];
  a.slices = 1;
  return a;
}

// A kernel holds the bodies of both widths of numbers: what the larger one takes.
template <template <class, int> class Shape, int kDim>
KernelInfo info(const char* kernel) {
  const int wide = Shape<float, kDim>::kShared, narrow = Shape<Number16, kDim>::kShared;
  return {std::string("attention_") + kernel + "_kernel<" + std::to_string(kDim) + ">", kAttentionThreads,
          wide > narrow ? wide : narrow};
}

template <int kDim>
void add_kernels(std::vector<KernelInfo>& to) {
  to.push_back(info<ForwardShape, kDim>("forward"));
  to.push_back(info<QueryGradientShape, kDim>("query_gradient"));
  to.push_back(info<KeyGradientShape, kDim>("key_gradient"));
}

}  // namespace

std::vector<KernelInfo> attention_kernels() {
  std::vector<KernelInfo> kernels{{"attention_delta_kernel", kDeltaThreads, 0},
                                  {"attention_combine_kernel", kCombineThreads, kCombineShared},
                                  {"attention_bias_gradient_kernel", kAttentionThreads, BiasGradientShape<float>::kShared}};
  add_kernels<64>(kernels);
  add_kernels<128>(kernels);
  add_kernels<256>(kernels);
  for (const KernelInfo& k : hopper_attention_kernels()) kernels.push_back(k);
  return kernels;
}

void attention_forward(const AttentionParams& p, const Tensor& records, void* stream) {
  if (!records && run_hopper_attention_forward(p, stream)) return;
  AttentionArgs a = make_args(p);
  if (records) {
    a.parts = static_cast<int>(records.size[0]);
    a.records = records.as<float>();
    a.n_records = p.batch() * p.heads() * p.n_queries() * a.parts;
  }
  run_attention_forward(a, p.q.dtype, stream);
  if (records) run_attention_combine(a, stream);
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

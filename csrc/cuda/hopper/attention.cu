// From an attention call to the arguments of sm_90a's kernels.
#include "attention.h"

#include "tensor_map.h"

namespace hierkernels::cuda {
namespace {

// Shorter sequences are packed into tiles by the kernels of sm_80, which waste less on them.
constexpr int kMinRows = 128, kMinKeys = 128;
constexpr int64_t kCachedBytes = 16 << 20;  // of keys and values that a section's tiles share; of 50 MB of L2

bool serves(const AttentionParams& p) {
  const bool modified = p.bias || p.mask || p.padding || p.softcap > 0 || p.dropout_p > 0;
  return is_hopper() && !modified && p.scale > 0 && p.dim() == p.dim_v() && p.n_keys() >= kMinKeys;
}

// Heads of a group that fill rows together: all of them, where 64 rows are a whole number of queries.
int heads_to_pack(int64_t group) { return kGroupRows % group == 0 ? static_cast<int>(group) : 1; }

// A (B, H, N, D) tensor, of which copies take `heads` heads of `tokens` tokens.
bool make_map(TensorMap& map, const Tensor& t, int heads, int tokens) {
  int64_t stride[4] = {1, t.stride[1], t.stride[2], t.stride[0]};
  const int64_t size[4] = {t.size[3], t.size[1], t.size[2], t.size[0]};
  for (int d = 1; d < 4; ++d)
    if (size[d] == 1) stride[d] = t.size[3];  // never used, but must be one that is allowed
  return make_tensor_map(map, t.data, t.dtype == DType::kFloat16, 4, size, stride, {64, heads, tokens, 1});
}

}  // namespace

bool make_hopper_args(HopperArgs& to, const AttentionParams& p, int row_box, int key_box) {
  if (!serves(p)) return false;
  to = {};
  to.pack = heads_to_pack(p.group());
  to.packs = static_cast<int>(p.group()) / to.pack;
  to.rows = static_cast<int>(p.n_queries()) * to.pack;
  if (to.rows < kMinRows) return false;
  to.out = Rows::of(p.out);
  to.lse = p.lse.as<float>();
  to.range = p.range;
  to.n_queries = static_cast<int>(p.n_queries());
  to.n_keys = static_cast<int>(p.n_keys());
  to.heads = static_cast<int>(p.heads());
  to.kv_heads = static_cast<int>(p.kv_heads());
  to.items = static_cast<int>(p.batch()) * to.heads / to.pack;
  to.scale = static_cast<float>(p.scale);
  to.dq = Rows::of(p.dq);
  to.dk = Rows::of(p.dk);
  to.dv = Rows::of(p.dv);
  const bool aligned = to.dq.aligned && to.dk.aligned && to.dv.aligned;
  if (p.dout && !(aligned && make_map(to.dout, p.dout, to.pack, row_box / to.pack))) return false;
  return to.out.aligned && make_map(to.q, p.q, to.pack, row_box / to.pack) && make_map(to.k, p.k, 1, key_box) &&
         make_map(to.v, p.v, 1, key_box);
}

int plan_tiles(HopperArgs& p, int length, int size, int64_t bytes) {
  p.tiles_per_item = (length + size - 1) / size;
  int64_t section = kCachedBytes / (bytes < 1 ? 1 : bytes);
  section = section < 1 ? 1 : section < p.items ? section : p.items;
  p.section = static_cast<int>(section);
  return p.items * p.tiles_per_item;
}

std::vector<KernelInfo> hopper_attention_kernels() {
  std::vector<KernelInfo> kernels;
  for (const int dim : {64, 128})
    for (const auto info : {hopper_forward_info, hopper_query_gradient_info, hopper_key_gradient_info})
      kernels.push_back(info(dim));
  return kernels;
}

}  // namespace hierkernels::cuda

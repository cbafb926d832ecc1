// The operators of selected attention: from the call's parameters to launches.
#include "../operators.h"
#include "kernels.h"

namespace hierkernels::cuda {
namespace {

constexpr int kSetRows = 16;  // of neighbouring queries that are computed together
constexpr int kSegments = 256, kLeastSegment = 32;  // of the queries that are sorted, and queries of one

Naming make_naming(const SelectedParams& p) {
  Naming n{p.indices.data, p.indices.dtype == DType::kInt64, {}, static_cast<int>(p.named()), p.include_own_block, 0};
  for (int d = 0; d < 4; ++d) n.stride[d] = p.indices.stride[d];
  return n;
}

SelectedArgs make_args(const SelectedParams& p) {
  SelectedArgs a{};
  a.q = Rows::of(p.q);
  a.k = Rows::of(p.k);
  a.v = Rows::of(p.v);
  a.out = Rows::of(p.out);
  a.lse = p.lse.as<float>();
  a.batch = static_cast<int>(p.batch());
  a.n_queries = static_cast<int>(p.n_queries());
  a.n_keys = static_cast<int>(p.n_keys());
  a.heads = static_cast<int>(p.heads());
  a.kv_heads = static_cast<int>(p.kv_heads());
  a.choosers = static_cast<int>(p.indices.size[1]);
  a.pack = a.heads / a.choosers;
  a.block_size = static_cast<int>(p.block_size < p.n_keys() ? p.block_size : p.n_keys());
  a.first_position = a.n_keys - a.n_queries;
  a.causal = p.is_causal;
  a.scale = static_cast<float>(p.scale);
  a.naming = make_naming(p);
  a.naming.blocks = (a.n_keys + a.block_size - 1) / a.block_size;
  a.weights = {p.weights.data, p.weights.dtype, {}};
  for (int d = 0; d < 4; ++d) a.weights.stride[d] = p.weights.stride[d];
  a.set = p.weights || a.pack > kSetRows ? 1 : kSetRows / a.pack;
  a.sets = (a.n_queries + a.set - 1) / a.set;
  a.merge = 1;
  const int most = a.set * (a.naming.named + a.naming.own);
  a.visits_stride = most < a.naming.blocks ? most : a.naming.blocks;
  return a;
}

int64_t list_count(const SelectedArgs& a) { return static_cast<int64_t>(a.batch) * a.choosers * a.sets; }
int64_t list_words(const SelectedArgs& a) { return list_count(a) * (2 * a.visits_stride + 1); }

// The lists of single queries that the key-major backward inverts, of blocks merged to tiles of keys.
void plan_inverse(SelectedArgs& a, DType dtype) {
  const int fit = selected_key_tile(a, dtype) / a.block_size;
  a.merge = a.weights.data || fit < 1 ? 1 : fit < 32 ? fit : 32;  // a bit for each
  a.merged_blocks = (a.naming.blocks + a.merge - 1) / a.merge;
  a.set = 1;
  a.sets = a.n_queries;
  const int most = a.naming.named + a.naming.own;
  a.visits_stride = most < a.merged_blocks ? most : a.merged_blocks;
}

void find_lists(SelectedArgs& a, const Tensor& memory) {
  a.visits = memory.as<Visit>();
  a.counts = reinterpret_cast<const int*>(a.visits + list_count(a) * a.visits_stride);
}

// Fills the lists of the sets, in memory of list_words() words.
void make_lists(SelectedArgs& a, const Tensor& memory, void* stream) {
  find_lists(a, memory);
  run_selected_lists({a.naming, a.n_queries, a.choosers, a.block_size, a.first_position, a.causal, a.set, a.sets, a.merge,
                      a.weights.data != nullptr, list_count(a), memory.as<Visit>(), const_cast<int*>(a.counts),
                      a.visits_stride},
                     stream);
}

SortArgs sort_args(const SelectedArgs& a, int segments) {
  const int rows = a.choosers / a.kv_heads * a.n_queries;
  return {a.visits, a.counts, nullptr, nullptr, a.visits_stride, a.batch * a.kv_heads, rows, a.merged_blocks, segments};
}

// A kernel holds the bodies of both widths of numbers: what the larger one takes.
template <int kDim>
void add_kernels(std::vector<KernelInfo>& to) {
  using Wide = SelectedShape<float, kDim>;
  using Narrow = SelectedShape<Number16, kDim>;
  const auto add = [&](const char* kernel, int wide, int narrow) {
    to.push_back({std::string("selected_") + kernel + "_kernel<" + std::to_string(kDim) + ">", kAttentionThreads,
                  wide > narrow ? wide : narrow});
  };
  add("forward", Wide::kForwardShared, Narrow::kForwardShared);
  add("query_gradient", Wide::kQueryShared, Narrow::kQueryShared);
  add("key_gradient", SelectedKeyShape<float, kDim>::kShared, SelectedKeyShape<Number16, kDim>::kShared);
}

}  // namespace

std::vector<KernelInfo> selected_kernels() {
  std::vector<KernelInfo> kernels{{"selected_lists_kernel", kListThreads, 0},
                                  {"selected_sort_kernel", kWarp, kSortRange * static_cast<int>(sizeof(int))},
                                  {"selected_sum_kernel", kSumThreads, 0}};
  add_kernels<64>(kernels);
  add_kernels<128>(kernels);
  add_kernels<256>(kernels);
  return kernels;
}

SelectedPlan selected_plan(const SelectedParams& p) {
  SelectedArgs a = make_args(p);
  SelectedPlan plan{};
  plan.set_words = list_words(a);
  plan_inverse(a, p.q.dtype);
  plan.visit_words = list_words(a);
  plan.pairs = a.batch * a.kv_heads;
  plan.blocks = a.merged_blocks;
  plan.visits = static_cast<int64_t>(a.choosers / a.kv_heads) * a.n_queries * a.visits_stride;
  plan.keys = a.merge * a.block_size;
  const int64_t rows = static_cast<int64_t>(a.choosers / a.kv_heads) * a.n_queries;
  plan.segments = rows < kSegments * kLeastSegment ? (rows + kLeastSegment - 1) / kLeastSegment : kSegments;
  return plan;
}

void selected_forward(const SelectedParams& p, const Tensor& lists, void* stream) {
  SelectedArgs a = make_args(p);
  make_lists(a, lists, stream);
  run_selected_forward(a, p.q.dtype, stream);
}

void selected_backward_queries(const SelectedParams& p, const Tensor& lists, const Tensor& delta, void* stream) {
  run_attention_delta(p.out, p.dout, p.dlse, delta, stream);
  SelectedArgs a = make_args(p);
  make_lists(a, lists, stream);
  a.dout = Rows::of(p.dout);
  a.dq = Rows::of(p.dq);
  a.delta = delta.as<float>();
  a.dweights = p.dweights.as<float>();
  run_selected_query_gradient(a, p.q.dtype, stream);
}

int selected_weight_parts(const SelectedParams& p) { return selected_row_blocks(make_args(p), p.q.dtype); }

void selected_count_visits(const SelectedParams& p, const Tensor& visits, const Tensor& counts, void* stream) {
  SelectedArgs a = make_args(p);
  plan_inverse(a, p.q.dtype);
  make_lists(a, visits, stream);
  SortArgs s = sort_args(a, static_cast<int>(counts.size[2]));
  s.counts = counts.as<int>();
  run_selected_sort(s, stream);
}

void selected_place_visits(const SelectedParams& p, const Tensor& visits, const Tensor& offsets, const Tensor& visitors,
                           void* stream) {
  SelectedArgs a = make_args(p);
  plan_inverse(a, p.q.dtype);
  find_lists(a, visits);
  SortArgs s = sort_args(a, static_cast<int>(offsets.size[2]));
  s.counts = offsets.as<int>();
  s.visitors = visitors.as<Visit>();
  run_selected_sort(s, stream);
}

void selected_backward_keys(const SelectedParams& p, const SelectedInverse& inverse, const Tensor& delta, void* stream) {
  SelectedArgs a = make_args(p);
  plan_inverse(a, p.q.dtype);
  a.dout = Rows::of(p.dout);
  a.dk = Rows::of(p.dk);
  a.dv = Rows::of(p.dv);
  a.delta = delta.as<float>();
  a.visitors = inverse.visitors.as<Visit>();
  a.starts = inverse.starts.as<int>();
  a.item_block = inverse.item_block.as<int>();
  a.items = static_cast<int>(inverse.item_block.size[1]);
  a.first_item = inverse.first_item.as<int>();
  a.first_part = inverse.first_part.as<int>();
  a.parts = inverse.parts.as<float>();
  a.chunk = static_cast<int>(inverse.chunk);
  run_selected_key_gradient(a, p.q.dtype, stream);
  if (a.parts) run_selected_sum(a, p.q.dtype, stream);
}

}  // namespace hierkernels::cuda

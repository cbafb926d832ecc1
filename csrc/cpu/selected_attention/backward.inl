// The backward kernel, in one pass over the blocks of keys: the rows of a block are the queries that visit it, out of
// an inverse index. dK and dV of a block are sums over its rows, and dQ is summed row by row while blocks follow one
// another. So scores and dP are computed once, where separate passes for dQ and for dK and dV would compute them twice.
//
// A task is a (batch, kv head) and a range of its queries. It owns their dQ and their gradients of the weights; the dK
// and dV of the ranges of one head are added in order. So no sum depends on the order in which threads run, and a
// block that every query visits is shared by as many tasks as there are ranges.
#pragma once
#include <omp.h>

#include <new>

#include "../attention/softmax.h"
#include "../scratch.h"
#include "backward_rows.h"
#include "inverse_index.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

constexpr int kAhead = 4;  // visitors

// E: what products multiply (operands.h).
template <class E>
class SelectedBackward {
  using O = Operands<E>;
  using F = typename O::Sum;
  static constexpr int W = kWidth<F>;
  static constexpr bool kPairs = O::kTerms == 2;

 public:
  SelectedBackward(const SelectedParams& p, const Storage<F>& storage)
      : p_(p),
        storage_(storage),
        dim_(static_cast<int>(p.dim())),
        dim_v_(static_cast<int>(p.dim_v())),
        padded_(O::padded(dim_)),
        padded_v_(O::padded(dim_v_)) {
    keys_ = static_cast<int>(p.block_size < kSelectedKeys ? p.block_size : kSelectedKeys);
    stride_ = round_up(keys_, W) + W;
    k_in_place_ = O::in_place(storage) && dim_ == padded_;
    plan(omp_get_max_threads());
    has_large_lse_ = any_large_lse(p.lse.as<F>(), p.batch() * p.heads() * p.n_queries());

    const auto part = [&](int64_t count) { return layout_.add(static_cast<size_t>(count) * sizeof(F)); };
    const int64_t whole_keys = round_up(keys_, W);
    rows_at_ = layout_.add(sizeof(GatheredRows<F>));
    scores_at_ = part(kGatheredRows * stride_);
    dp_at_ = part(kGatheredRows * stride_);
    q_at_ = part(kGatheredRows * O::row_stride(dim_));
    dout_at_ = part(kGatheredRows * O::row_stride(dim_v_));
    zipped_q_at_ = part(kPairs ? kGatheredRows / 2 * padded_ : 0);
    zipped_dout_at_ = part(kPairs ? kGatheredRows / 2 * padded_v_ : 0);
    p_rows_at_ = part(kPairs ? kGatheredRows / 2 * stride_ : 0);
    ds_rows_at_ = part(kPairs ? kGatheredRows / 2 * stride_ : 0);
    ds_keys_at_ = part(kPairs ? kGatheredRows * stride_ / 2 : 0);
    dq_tile_at_ = part(kGatheredRows * padded_);
    k_tiles_at_ = part(whole_keys / W * O::tile_size(dim_));
    v_tiles_at_ = part(whole_keys / W * O::tile_size(dim_v_));
    k_at_ = part(k_in_place_ ? 0 : whole_keys * padded_);
    dk_at_ = part(chunks_ > 1 || splits_ > 1 ? 0 : whole_keys * padded_);
    dv_at_ = part(chunks_ > 1 || splits_ > 1 ? 0 : whole_keys * padded_v_);
    sums_at_ = part(chunks_ > 1 && splits_ == 1 ? sums_size() : 0);
    const int64_t chunk_rows = chunk_ * p.group();
    for (size_t* at : {&lse_at_, &lse_low_at_, &delta_at_, &p_sum_at_}) *at = part(round_up(chunk_rows, W));
    dq_at_ = part(storage.native ? 0 : chunk_rows * padded_);
    seen_at_ = layout_.add(static_cast<size_t>(p.blocks()) * sizeof(int32_t));
    begins_at_ = layout_.add(static_cast<size_t>(InverseIndex::begins_size(p)) * sizeof(int64_t));
    visitors_at_ = layout_.add(static_cast<size_t>(InverseIndex::visitors_size(p, chunk_)) * sizeof(Visitor));
  }

  void run() {
    const int64_t pairs = p_.batch() * p_.kv_heads(), tasks = pairs * splits_;
    if (pairs == 0) return;
    F* partial = nullptr;
    if (splits_ > 1)
      partial = reinterpret_cast<F*>(
          thread_scratch(ScratchUse::kShared, static_cast<size_t>(tasks * sums_size()) * sizeof(F)));
#pragma omp parallel
    {
      Work w(*this, thread_scratch(ScratchUse::kTask, layout_.total()));
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < tasks; ++t) {
        w.b = t / splits_ / p_.kv_heads();
        w.kv_head = t / splits_ % p_.kv_heads();
        if (splits_ > 1) w.sums = partial + t * sums_size();
        task(w, t % splits_);
      }
      if (splits_ > 1) add_partial(partial, pairs);
    }
  }

 private:
  // What a thread works with.
  struct Work {
    GatheredRows<F>& rows;
    F *scores, *dp, *dq_tile, *dk, *dv, *sums, *lse, *lse_low, *delta, *p_sum, *dq;
    E *q, *dout, *k_tiles, *v_tiles, *k;
    E *zipped_q, *zipped_dout, *p_rows, *ds_rows, *ds_keys;  // pairs of rows, and of keys
    VisitWalker walker;
    InverseIndex index;
    int64_t b = 0, kv_head = 0, first_query = 0;

    Work(const SelectedBackward& f, char* scratch)
        : rows(*new (scratch + f.rows_at_) GatheredRows<F>),
          scores(at<F>(scratch, f.scores_at_)),
          dp(at<F>(scratch, f.dp_at_)),
          dq_tile(at<F>(scratch, f.dq_tile_at_)),
          dk(at<F>(scratch, f.dk_at_)),
          dv(at<F>(scratch, f.dv_at_)),
          sums(at<F>(scratch, f.sums_at_)),
          lse(at<F>(scratch, f.lse_at_)),
          lse_low(at<F>(scratch, f.lse_low_at_)),
          delta(at<F>(scratch, f.delta_at_)),
          p_sum(at<F>(scratch, f.p_sum_at_)),
          dq(at<F>(scratch, f.dq_at_)),
          q(at<E>(scratch, f.q_at_)),
          dout(at<E>(scratch, f.dout_at_)),
          k_tiles(at<E>(scratch, f.k_tiles_at_)),
          v_tiles(at<E>(scratch, f.v_tiles_at_)),
          k(at<E>(scratch, f.k_at_)),
          zipped_q(at<E>(scratch, f.zipped_q_at_)),
          zipped_dout(at<E>(scratch, f.zipped_dout_at_)),
          p_rows(at<E>(scratch, f.p_rows_at_)),
          ds_rows(at<E>(scratch, f.ds_rows_at_)),
          ds_keys(at<E>(scratch, f.ds_keys_at_)),
          walker(f.p_, reinterpret_cast<int32_t*>(scratch + f.seen_at_)),
          index(f.p_, reinterpret_cast<int64_t*>(scratch + f.begins_at_),
                reinterpret_cast<Visitor*>(scratch + f.visitors_at_)) {}
    template <class T>
    static T* at(char* scratch, size_t offset) {
      return reinterpret_cast<T*>(scratch + offset);
    }
  };

  // Ranges of queries for the tasks of a head, and chunks of a range, whose dQ is in scratch at the same time.
  void plan(int64_t threads) {
    constexpr int64_t kPartialBudget = int64_t{256} << 20, kChunkBudget = int64_t{4} << 20, kLeastQueries = 64;
    const int64_t pairs = p_.batch() * p_.kv_heads(), queries = p_.n_queries();
    splits_ = 1;
    if (pairs > 0 && pairs < 4 * threads) {
      while (splits_ < threads && pairs * splits_ % threads != 0) ++splits_;
      if (splits_ > queries / kLeastQueries) splits_ = queries / kLeastQueries;
      while (splits_ > 1 && pairs * splits_ * sums_size() * static_cast<int64_t>(sizeof(F)) > kPartialBudget) --splits_;
      if (splits_ < 1) splits_ = 1;
    }
    const int64_t range = (queries + splits_ - 1) / splits_;
    chunk_ = range;
    if (!storage_.native) {
      const int64_t fit = kChunkBudget / (p_.group() * padded_ * static_cast<int64_t>(sizeof(F)));
      if (fit < chunk_) chunk_ = fit < kLeastQueries ? kLeastQueries : fit;
    }
    chunks_ = chunk_ > 0 ? (range + chunk_ - 1) / chunk_ : 1;
  }

  int64_t sums_size() const { return p_.n_keys() * (padded_ + padded_v_); }
  int64_t first_query(int64_t split) const { return p_.n_queries() * split / splits_; }

  void task(Work& w, int64_t split) const {
    const bool direct = chunks_ == 1 && splits_ == 1;
    if (!direct) memset(w.sums, 0, static_cast<size_t>(sums_size()) * sizeof(F));
    const int64_t end = first_query(split + 1);
    int64_t i = first_query(split);
    do {
      const int64_t left = end - i, queries = left < chunk_ ? left : chunk_;
      start_chunk(w, i, queries);
      for (int64_t block = 0; block < p_.blocks(); ++block) {
        if (w.index.count(block) == 0 && !direct) continue;
        const int64_t key = block * p_.block_size, size = p_.n_keys() - key;
        const int64_t block_end = key + (size < p_.block_size ? size : p_.block_size);
        for (int64_t from = key; from < block_end; from += keys_)
          key_tile(w, block, from, static_cast<int>(block_end - from < keys_ ? block_end - from : keys_), direct);
      }
      if (!storage_.native) {
        const F one = F(1);
        storage_.store(rows_of(p_.dq, storage_, w.b, w.kv_head, p_.group()), i * p_.group(),
                       static_cast<int>(queries * p_.group()), dim_, w.dq, padded_, &one, 0, false);
      }
      i += queries;
    } while (i < end);
    if (!direct && splits_ == 1) store_keys(w.b, w.kv_head, 0, p_.n_keys(), w.sums, w.sums + p_.n_keys() * padded_);
  }

  // The inverse index of the queries [first, first + queries), what their rows need, and zeros where they add.
  void start_chunk(Work& w, int64_t first, int64_t queries) const {
    const int64_t group = p_.group(), choices = p_.choices(), n_queries = p_.n_queries();
    w.first_query = first;
    w.index.build(w.walker, w.b, w.kv_head, first, queries);
    const Rows out = rows_of(p_.out, storage_, w.b, w.kv_head, group);
    const Rows dout = rows_of(p_.dout, storage_, w.b, w.kv_head, group);
    storage_.dot(out, dout, first * group, static_cast<int>(queries * group), dim_v_, w.delta);
    const int64_t at = (w.b * p_.heads() + w.kv_head * group) * n_queries;
    const F infinite = static_cast<F>(__builtin_inff());
    for (int64_t h = 0; h < group; ++h)
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t r = i * group + h, from = at + h * n_queries + first + i;
        const F x = p_.lse.as<F>()[from];
        w.lse[r] = infinite;  // of a row that sees nothing
        w.lse_low[r] = F(0);
        if (x != -infinite) split_lse(x, w.lse[r], w.lse_low[r]);
        if (p_.dlse) w.delta[r] -= p_.dlse.as<F>()[from];
      }
    if (storage_.native && has_large_lse_) correct_lse(w, queries * group);
    if (storage_.native) {
      const Rows dq = rows_of(p_.dq, storage_, w.b, w.kv_head, group);
      RowCursor cursor(dq, first * group);
      for (int64_t r = 0; r < queries * group; ++r, cursor.next())
        memset(dq.data + cursor.offset() * static_cast<int64_t>(sizeof(F)), 0, static_cast<size_t>(dim_) * sizeof(F));
    } else {
      memset(w.dq, 0, static_cast<size_t>(queries * group * padded_) * sizeof(F));
    }
    if (p_.dweights)
      for (int64_t c = 0; c < choices; ++c)
        memset(p_.dweights.as<F>() + p_.dweights.stride[0] * w.b + p_.dweights.stride[1] * (w.kv_head * choices + c) +
                   p_.dweights.stride[2] * first,
               0, static_cast<size_t>(queries * p_.named()) * sizeof(F));
  }

  // What the log-sum-exps of a chunk lack (softmax.h), from the sums of P over all blocks that its rows visit.
  void correct_lse(Work& w, int64_t rows) const {
    clear(w.p_sum, 0, static_cast<int>(rows));
    for (int64_t block = 0; block < p_.blocks(); ++block) {
      const Visitor* const visitors = w.index.visitors(block);
      const Visitor* const visitors_end = visitors + w.index.count(block);
      const int64_t visits = w.index.count(block) * (p_.group() / p_.choices());
      const int64_t begin = block * p_.block_size, left = p_.n_keys() - begin;
      const int64_t end = begin + (left < p_.block_size ? left : p_.block_size);
      for (int64_t key = begin; visits > 0 && key < end; key += keys_) {
        const int keys = static_cast<int>(end - key < keys_ ? end - key : keys_);
        make_key_tiles(w, key, keys);
        for (int64_t r = 0; r < visits; r += kGatheredRows) {
          const int n = static_cast<int>(visits - r < kGatheredRows ? visits - r : kGatheredRows);
          gather(w, visitors, visitors_end, r, n, key, keys);
          multiply_keys(w, n, keys);
          add_probabilities(w.rows, n, w.scores, stride_);
        }
      }
    }
    for (int64_t r = 0; r < rows; r += W) store(w.lse_low + r, load(w.lse_low + r) + lse_correction<F>(load(w.p_sum + r)));
  }

  void make_key_tiles(Work& w, int64_t key, int keys) const {
    O::make_tiles(storage_, rows_of(p_.k, storage_, w.b, w.kv_head, 1), key, keys, dim_,
                  static_cast<F>(p_.scale * kLog2E), w.k_tiles);
  }
  // The scores of the gathered rows.
  void multiply_keys(Work& w, int n, int keys) const {
    multiply_block_keys<E>(n, w.q, O::row_stride(dim_), w.k_tiles, keys, dim_, static_cast<F>(p_.scale * kLog2E), w.scores,
                           stride_);
  }

  // Keys [key, key + keys) of a block and all rows that visit it.
  void key_tile(Work& w, int64_t block, int64_t key, int keys, bool direct) const {
    const int64_t heads = p_.group() / p_.choices(), rows = w.index.count(block) * heads;
    Target<F> dk = {w.dk, padded_, Update::kStore}, dv = {w.dv, padded_v_, Update::kStore};
    if (!direct) {
      dk = {w.sums + key * padded_, padded_, Update::kAdd};
      dv = {w.sums + p_.n_keys() * padded_ + key * padded_v_, padded_v_, Update::kAdd};
    } else if (rows == 0) {
      clear(w.dk, 0, keys * padded_);
      clear(w.dv, 0, keys * padded_v_);
    }
    if (rows > 0) {
      const Rows k_rows = rows_of(p_.k, storage_, w.b, w.kv_head, 1);
      const Rows v_rows = rows_of(p_.v, storage_, w.b, w.kv_head, 1);
      make_key_tiles(w, key, keys);
      O::make_tiles(storage_, v_rows, key, keys, dim_v_, F(1), w.v_tiles);
      const E* k = w.k;
      int64_t k_stride = padded_;
      if (k_in_place_) {
        k = reinterpret_cast<const E*>(k_rows.data) + key * k_rows.token_stride;
        k_stride = k_rows.token_stride;
      } else {
        O::make_rows(storage_, k_rows, key, keys, dim_, w.k);
      }
      const Visitor* const visitors = w.index.visitors(block);
      const Visitor* const visitors_end = visitors + w.index.count(block);
      for (int64_t r = 0; r < rows; r += kGatheredRows, dk.update = dv.update = Update::kAdd)
        row_tile(w, visitors, visitors_end, r,
                 static_cast<int>(rows - r < kGatheredRows ? rows - r : kGatheredRows), key, keys, k, k_stride, dk, dv);
    }
    if (direct) store_keys(w.b, w.kv_head, key, keys, w.dk, w.dv);
  }

  // Rows [first, first + n) of those that visit a block: row r is head r % heads of visitor r / heads.
  void row_tile(Work& w, const Visitor* visitors, const Visitor* visitors_end, int64_t first, int n, int64_t key,
                int keys, const E* k, int64_t k_stride, const Target<F>& dk, const Target<F>& dv) const {
    gather(w, visitors, visitors_end, first, n, key, keys);
    multiply_keys(w, n, keys);
    multiply_block_keys<E>(n, w.dout, O::row_stride(dim_v_), w.v_tiles, keys, dim_v_, F(1), w.dp, stride_);
    gradient_rows(w.rows, n, keys, p_.weights.data != nullptr, static_cast<F>(p_.scale), w.scores, w.dp, stride_);
    if constexpr (kPairs) {
      zip(w, n, keys);
      sum_over_rows<E>(n, w.p_rows, stride_, keys, w.zipped_dout, padded_v_, padded_v_, dv);
      sum_over_rows<E>(n, w.ds_rows, stride_, keys, w.zipped_q, padded_, padded_, dk);
      sum_over_keys<E>(n, w.ds_keys, stride_ / 2, keys, k, k_stride, padded_, w.dq_tile);
    } else {
      sum_over_rows<E>(n, w.scores, stride_, keys, w.dout, padded_v_, padded_v_, dv);
      sum_over_rows<E>(n, w.dp, stride_, keys, w.q, padded_, padded_, dk);
      sum_over_keys<E>(n, w.dp, stride_, keys, k, k_stride, padded_, w.dq_tile);
    }
    for (int r = 0; r < n; ++r) {
      F* dq = w.rows.dq[r];
      const F* x = w.dq_tile + r * padded_;
      int c = 0;
      for (; c + W <= dim_; c += W) store(dq + c, load(dq + c) + load(x + c));
      if (c < dim_) store(dq + c, load(dq + c, dim_ - c) + load(x + c), dim_ - c);
    }
    if (p_.dweights)
      for (int r = 0; r < n; ++r)
        if (w.rows.dweight[r]) *w.rows.dweight[r] += w.rows.weight_sum[r];
  }

  // Operands of the sums over rows and over keys, where products take pairs.
  void zip(Work& w, int n, int keys) const {
    const int end = round_up(keys, W);
    const auto rows = [](const E* x, int64_t stride) {
      return [=](int r) { return reinterpret_cast<const uint16_t*>(x + r * stride); };
    };
    O::zip_rows(rows(w.q, O::row_stride(dim_)), n, padded_, w.zipped_q);
    O::zip_rows(rows(w.dout, O::row_stride(dim_v_)), n, padded_v_, w.zipped_dout);
    for (int r = 0; r < n; r += 2) {
      const bool two = r + 1 < n;
      const F *p = w.scores + r * stride_, *ds = w.dp + r * stride_;
      O::zip_rounded(p, two ? p + stride_ : nullptr, end, w.p_rows + r / 2 * stride_);
      O::zip_rounded(ds, two ? ds + stride_ : nullptr, end, w.ds_rows + r / 2 * stride_);
    }
    for (int r = 0; r < n; ++r) O::round_row(w.dp + r * stride_, end, w.ds_keys + r * (stride_ / 2));
  }

  // Rows lie anywhere: those of a visitor to come are asked for.
  HK_INLINE void ask_for(Work& w, int32_t item, int64_t heads) const {
    const int64_t choices = p_.choices(), group = p_.group(), i = item / choices, head = item % choices * heads;
    const auto ask = [&](const Tensor& t) {
      const int64_t head_step = t.stride[1] * storage_.bytes;
      const char* row = rows_of(t, storage_, w.b, w.kv_head, group).data + head * head_step +
                        (w.first_query + i) * t.stride[2] * storage_.bytes;
      for (int64_t h = 0; h < heads; ++h) prefetch(row + h * head_step, t.size[3] * storage_.bytes);
    };
    ask(p_.q);
    ask(p_.dout);
    if (storage_.native)
      ask(p_.dq);
    else
      prefetch(w.dq + (i * group + head) * padded_, heads * padded_ * static_cast<int64_t>(sizeof(F)));
  }

  void gather(Work& w, const Visitor* visitors, const Visitor* visitors_end, int64_t first, int n, int64_t key,
              int keys) const {
    const int64_t group = p_.group(), choices = p_.choices(), heads = group / choices;
    const Rows q_rows = rows_of(p_.q, storage_, w.b, w.kv_head, group);
    const Rows dout_rows = rows_of(p_.dout, storage_, w.b, w.kv_head, group);
    const Rows dq_rows = rows_of(p_.dq, storage_, w.b, w.kv_head, group);
    GatheredRows<F>& rows = w.rows;
    const Visitor* visitor = visitors + first / heads;
    int64_t skip = first % heads;  // heads that the tile before took
    for (int r = 0; r < n; ++visitor, skip = 0) {
      if (visitor + kAhead < visitors_end) ask_for(w, visitor[kAhead].item, heads);
      const int64_t i = visitor->item / choices, c = visitor->item % choices, head = c * heads + skip;
      const int count = static_cast<int>(heads - skip < n - r ? heads - skip : n - r);
      const int64_t query = w.first_query + i, row = query * group + head;
      O::load_rows(storage_, q_rows, row, count, dim_, w.q + r * O::row_stride(dim_));
      O::load_rows(storage_, dout_rows, row, count, dim_v_, w.dout + r * O::row_stride(dim_v_));
      const int64_t seen = p_.is_causal ? p_.position(query) - key + 1 : keys;
      const int64_t choice = w.kv_head * choices + c;
      const F weight = weight_of<F>(p_, w.b, choice, query, visitor->slot);
      F* dweight = nullptr;
      if (p_.dweights && visitor->slot < p_.named()) {
        const Tensor& t = p_.dweights;
        dweight = t.as<F>() + w.b * t.stride[0] + choice * t.stride[1] + query * t.stride[2] + visitor->slot;
      }
      for (int h = 0; h < count; ++h, ++r) {
        const int64_t at = i * group + head + h;
        rows.to[r] = seen < 0 ? 0 : seen < keys ? static_cast<int>(seen) : keys;
        rows.lse[r] = w.lse[at];
        rows.lse_low[r] = w.lse_low[at];
        rows.delta[r] = w.delta[at];
        rows.p_sum[r] = w.p_sum + at;
        rows.weight[r] = weight;
        rows.dweight[r] = dweight;
        rows.dq[r] = w.dq + at * padded_;
        if (storage_.native)
          rows.dq[r] = reinterpret_cast<F*>(dq_rows.data) + query * dq_rows.token_stride +
                       (head + h) * dq_rows.head_stride;
      }
    }
  }

  void store_keys(int64_t b, int64_t kv_head, int64_t key, int64_t keys, const F* dk, const F* dv) const {
    const F one = F(1);
    const int n = static_cast<int>(keys);
    storage_.store(rows_of(p_.dk, storage_, b, kv_head, 1), key, n, dim_, dk, padded_, &one, 0, false);
    storage_.store(rows_of(p_.dv, storage_, b, kv_head, 1), key, n, dim_v_, dv, padded_v_, &one, 0, false);
  }

  // In a parallel region: the partial dK and dV of the ranges, in order.
  void add_partial(F* partial, int64_t pairs) const {
    constexpr int64_t kPart = 256;  // keys
    const int64_t parts = (p_.n_keys() + kPart - 1) / kPart;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < pairs * parts; ++t) {
      const int64_t pair = t / parts, key = t % parts * kPart;
      const int64_t keys = p_.n_keys() - key < kPart ? p_.n_keys() - key : kPart;
      F* const sums = partial + pair * splits_ * sums_size();
      F* const dk = sums + key * padded_;
      F* const dv = sums + p_.n_keys() * padded_ + key * padded_v_;
      for (int64_t s = 1; s < splits_; ++s) {
        add(dk, dk + s * sums_size(), keys * padded_);
        add(dv, dv + s * sums_size(), keys * padded_v_);
      }
      store_keys(pair / p_.kv_heads(), pair % p_.kv_heads(), key, keys, dk, dv);
    }
  }
  static void add(F* to, const F* x, int64_t count) {
    for (int64_t j = 0; j < count; j += W) store(to + j, load(to + j) + load(x + j));
  }

  const SelectedParams& p_;
  const Storage<F>& storage_;
  int dim_, dim_v_, padded_, padded_v_;
  int keys_;        // of a tile, at most
  int64_t stride_;  // of rows of scores
  bool k_in_place_, has_large_lse_;
  int64_t splits_, chunk_, chunks_;  // ranges; queries of a chunk at most; chunks of a range
  ScratchLayout layout_;
  size_t zipped_q_at_, zipped_dout_at_, p_rows_at_, ds_rows_at_, ds_keys_at_;
  size_t rows_at_, scores_at_, dp_at_, q_at_, dout_at_, dq_tile_at_, k_tiles_at_, v_tiles_at_, k_at_, dk_at_, dv_at_,
      sums_at_, lse_at_, lse_low_at_, delta_at_, p_sum_at_, dq_at_, seen_at_, begins_at_, visitors_at_;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

// The backward kernel: tiles of keys outside, blocks of packed rows inside. dK and dV of a tile of keys are summed in
// scratch over all rows (the heads of the group included), dQ in scratch over the tiles of keys: a ring of blocks of
// rows, each begun at the first tile that it sees and stored after the last. With a window the ring stays in cache.
#pragma once
#include <omp.h>

#include <new>

#include "../scratch.h"
#include "backward_plan.h"
#include "gradients.h"
#include "kernel_shape.h"
#include "storage.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Up to so many rows that see a tile of keys, the inputs of the next tile are asked for: they fit the second-level cache.
constexpr int64_t kNarrowRows = 4 * kBackwardRows;

template <class F>
class Backward {
 public:
  Backward(const AttentionParams& p, const Storage<F>& storage)
      : p_(p),
        storage_(storage),
        shape_(p, backward_rows(p), kTileKeys),
        blocks_{p.n_queries() * p.group(), backward_rows(p)},
        key_tiles_(p.n_keys() <= kTileKeys ? 1 : (p.n_keys() + kTileKeys - 1) / kTileKeys),
        whole_(key_tiles_ == 1) {
    const Rows q = rows_of(p.q, storage, 0, 0, p.group()), dout = rows_of(p.dout, storage, 0, 0, p.group());
    q_in_place_ = storage.native && shape_.dim == shape_.padded && q.uniform_stride(p.n_queries()) != 0;
    dout_in_place_ = storage.native && shape_.dim_v == shape_.padded_v && dout.uniform_stride(p.n_queries()) != 0;
    k_in_place_ = storage.native && shape_.dim == shape_.padded;
    v_in_place_ = storage.native && shape_.dim_v == shape_.padded_v;
    dq_in_place_ = whole_ && k_in_place_ && rows_of(p.dq, storage, 0, 0, p.group()).uniform_stride(p.n_queries()) != 0;
    dq_rows_ = whole_ ? shape_.rows : blocks_.rows;
    plan_ = plan_backward(p, omp_get_max_threads(), key_tiles_, dq_size() * static_cast<int64_t>(sizeof(F)), sizeof(F));
    ring_ = blocks_.count();
    if (!whole_ && plan_.splits == 1) {
      ring_ = 1;
      for (int64_t tile = 0; tile < key_tiles_; ++tile)
        if (const int64_t n = blocks_seeing(tile).end - blocks_seeing(tile).begin; n > ring_) ring_ = n;
      dq_rows_ = ring_ * blocks_.size;
      narrow_ = ring_ * blocks_.size <= kNarrowRows;
    }

    const auto part = [&](int64_t count) { return layout_.add(static_cast<size_t>(count) * sizeof(F)); };
    const int64_t keys = round_up(shape_.keys, shape_.panel), padded = shape_.padded, padded_v = shape_.padded_v;
    tile_at_ = layout_.add(sizeof(TileRows));
    scores_at_ = part(shape_.rows * shape_.stride);
    dp_at_ = part(shape_.rows * shape_.stride);
    k_panels_at_ = part(keys * padded);
    v_panels_at_ = part(keys * padded_v);
    k_at_ = part(k_in_place_ ? 0 : keys * padded);
    q_at_ = part(q_in_place_ ? 0 : shape_.rows * padded);
    dout_at_ = part(dout_in_place_ ? 0 : shape_.rows * padded_v);
    dk_at_ = part(keys * padded);
    dv_at_ = part(keys * padded_v);
    lse_at_ = part(dq_rows_);
    lse_low_at_ = part(dq_rows_);
    delta_at_ = part(dq_rows_);
    keep_at_ = part(kTileKeys);
    slope_at_ = part(p.softcap ? shape_.rows * shape_.stride : 0);
    additive_at_ = part(TileModifiers<F>::additive_rows(p) * kMostTileKeys);
    dq_at_ = part(plan_.splits > 1 ? 0 : dq_size());
  }

  void run() {
    const int64_t units = plan_.units();
    if (p_.dbias && !p_.bias_of_pairs()) clear_sums(p_.dbias);
    if (units == 0) return;
    const int at_once = tasks_at_once(units);
    const int64_t partial_dq = plan_.splits > 1 ? plan_.pairs() * plan_.splits * dq_size() : 0;
    const int64_t bias_copy = bias_size(), bias_copies = (plan_.chunks - 1) * bias_copy;
    const bool correct = !whole_ && storage_.native && any_large_lse(p_.lse.as<F>(), plan_.pairs() * blocks_.rows);
    const int64_t corrections = correct ? plan_.pairs() * blocks_.rows : 0;
    if (partial_dq + bias_copies + corrections > 0)
      shared_ = reinterpret_cast<F*>(thread_scratch(
          ScratchUse::kShared, static_cast<size_t>(partial_dq + bias_copies + corrections) * sizeof(F)));
    bias_copies_ = shared_ + partial_dq;
    lse_corrections_ = correct ? bias_copies_ + bias_copies : nullptr;
#pragma omp parallel
    {
      if (bias_copies > 0) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < bias_copies; ++i) bias_copies_[i] = F(0);
      }
      Work w(*this, thread_scratch(ScratchUse::kTask, layout_.total()));
      if (correct) {
        const int64_t blocks = blocks_.count();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < plan_.pairs() * blocks; ++i) correct_lse(w, i / blocks, blocks - 1 - i % blocks);
      }
#pragma omp for schedule(dynamic, at_once)
      for (int64_t u = 0; u < units; ++u) {
        const int64_t family = u / plan_.chunks, chunk = u % plan_.chunks;
        F* dbias = chunk == 0 ? p_.dbias.as<F>() : bias_copies_ + (chunk - 1) * bias_copy;
        for (int64_t m = plan_.first_member(chunk); m < plan_.first_member(chunk + 1); ++m) {
          w.following = following(u, m);
          task(w, plan_.task(family, m), dbias);
        }
      }
      if (plan_.splits > 1) add_partial_dq();
      stream_fence();
      if (bias_copies > 0) {
        F* dbias = p_.dbias.as<F>();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < bias_copy; ++i)
          for (int64_t c = 0; c + 1 < plan_.chunks; ++c) dbias[i] += bias_copies_[c * bias_copy + i];
      }
    }
  }

 private:
  // What a thread works with.
  struct Work {
    TileRows& tile;
    F *scores, *dp, *k_panels, *v_panels, *k, *q, *dout, *dk, *dv, *lse, *lse_low, *delta, *dq;
    int64_t begun = 0, stored = 0;  // blocks of rows of the task, if it is not split: those before have been
    TileModifiers<F> modifiers;
    GradientRows<F> rows;
    NextInputs next;
    BackwardTask following{};

    Work(const Backward& f, char* scratch)
        : tile(*new (scratch + f.tile_at_) TileRows),
          scores(at(scratch, f.scores_at_)),
          dp(at(scratch, f.dp_at_)),
          k_panels(at(scratch, f.k_panels_at_)),
          v_panels(at(scratch, f.v_panels_at_)),
          k(at(scratch, f.k_at_)),
          q(at(scratch, f.q_at_)),
          dout(at(scratch, f.dout_at_)),
          dk(at(scratch, f.dk_at_)),
          dv(at(scratch, f.dv_at_)),
          lse(at(scratch, f.lse_at_)),
          lse_low(at(scratch, f.lse_low_at_)),
          delta(at(scratch, f.delta_at_)),
          dq(at(scratch, f.dq_at_)),
          modifiers(f.p_, at(scratch, f.additive_at_)),
          rows{nullptr, nullptr, nullptr, static_cast<F>(f.p_.scale), at(scratch, f.keep_at_), at(scratch, f.slope_at_)} {}
    static F* at(char* scratch, size_t offset) { return reinterpret_cast<F*>(scratch + offset); }
  };

  // Rows that products read: in the tensor, or loaded to scratch.
  struct Operand {
    const F* data;
    int64_t stride;
  };

  // The task after member m of unit u; its batch entry does not exist if there is none.
  BackwardTask following(int64_t u, int64_t m) const {
    if (m + 1 < plan_.first_member(u % plan_.chunks + 1)) return plan_.task(u / plan_.chunks, m + 1);
    if (++u == plan_.units()) return {p_.batch(), 0, 0};
    return plan_.task(u / plan_.chunks, plan_.first_member(u % plan_.chunks));
  }

  // Aims at what the tile of keys after this one, of the same head or the next, reads for the first time.
  void aim_at_following(Work& w, BackwardTask t, int64_t tile) const {
    w.next.aim_at_nothing();
    int64_t known = blocks_seeing(tile).end;  // blocks of rows before are in the caches
    if (++tile == key_tiles_) {
      t = w.following;
      tile = known = 0;
      if (t.b >= p_.batch()) return;
    }
    const Blocks blocks = blocks_seeing(tile);
    if (blocks.begin > known) known = blocks.begin;
    const int64_t group = p_.group(), key = tile * kTileKeys, rows = blocks.end * blocks_.size;
    const int64_t end = key + kTileKeys < p_.n_keys() ? key + kTileKeys : p_.n_keys();
    const int64_t first_query = known * blocks_.size / group;
    const int64_t end_query = ((rows < blocks_.rows ? rows : blocks_.rows) + group - 1) / group;
    w.next.also({&p_.k, &p_.v}, t.b, t.kv_head, 1, key, end);
    w.next.also({&p_.q, &p_.dout, &p_.out}, t.b, t.kv_head * group, group, first_query, end_query);
  }

  int64_t dq_size() const { return dq_rows_ * shape_.padded; }
  // The first row of a block in the ring.
  int64_t slot(int64_t block) const { return block % ring_ * blocks_.size; }

  // The blocks of rows that see one of a tile's keys. Both ends grow with the tile.
  struct Blocks {
    int64_t begin, end;
  };
  Blocks blocks_seeing(int64_t tile) const {
    const int64_t key = tile * kTileKeys, queries = p_.n_queries();
    const int64_t after = key + kTileKeys < p_.n_keys() ? key + kTileKeys : p_.n_keys();
    return {p_.range.hi.first_reaching(key + 1, queries) * p_.group() / blocks_.size,
            (p_.range.lo.first_reaching(after, queries) * p_.group() + blocks_.size - 1) / blocks_.size};
  }
  int64_t bias_size() const {
    const Tensor& g = p_.dbias;
    return g ? g.size[0] * g.size[1] * g.size[2] * g.size[3] : 0;
  }

  void task(Work& w, const BackwardTask& t, F* dbias) const {
    const int64_t pair = t.b * p_.kv_heads() + t.kv_head;
    F* dq = plan_.splits > 1 ? shared_ + (pair * plan_.splits + t.split) * dq_size() : w.dq;
    w.begun = w.stored = 0;
    if (plan_.splits > 1) {
      prepare_rows(t, 0, blocks_.rows, w.lse, w.lse_low, w.delta);
      memset(dq, 0, static_cast<size_t>(dq_size()) * sizeof(F));
      w.begun = w.stored = blocks_.count();
    }
    if (p_.dbias && p_.bias_of_pairs() && t.split == 0) {
      const TileBiasGradient<F> bias = bias_gradient(t, dbias);
      for (int64_t g = 0; g < p_.group(); ++g)
        for (int64_t i = 0; i < p_.n_queries(); ++i)
          bias.clear_unseen(g, i, p_.range.lo.at(i, p_.n_keys()), p_.range.hi.at(i, p_.n_keys()), p_.n_keys());
    }
    for (int64_t round = 0; round * plan_.splits < key_tiles_; ++round)
      if (const int64_t tile = plan_.tile(t.split, round); tile < key_tiles_) key_tile(w, t, tile, dq, dbias);
    if (!whole_) store_blocks(w, t, blocks_.count(), dq);
  }

  // dQ of all blocks before `end` that are not stored yet; 0 for those that no tile has begun.
  void store_blocks(Work& w, const BackwardTask& t, int64_t end, F* dq) const {
    for (; w.stored < end; ++w.stored) {
      F* x = dq + slot(w.stored) * shape_.padded;
      if (w.stored >= w.begun) memset(x, 0, static_cast<size_t>(blocks_.size * shape_.padded) * sizeof(F));
      store_dq(t, blocks_.first(w.stored), blocks_.rows_of(w.stored), x);
    }
    if (w.begun < end) w.begun = end;
  }

  // body(r, offset) for rows first .. first + n: where their numbers lie in lse and dlse.
  template <class Body>
  HK_INLINE void for_numbers(const BackwardTask& t, int64_t first, int64_t n, Body body) const {
    const int64_t group = p_.group(), queries = p_.n_queries();
    const int64_t at = (t.b * p_.heads() + t.kv_head * group) * queries;
    if (group == 1) {
      for (int64_t r = 0; r < n; ++r) body(r, at + first + r);
      return;
    }
    int64_t i = first / group, g = first % group;
    for (int64_t r = 0; r < n; ++r) {
      body(r, at + g * queries + i);
      if (++g == group) {
        g = 0;
        ++i;
      }
    }
  }

  // delta of rows first .. first + n: the sum of P dP, less dlse; if the tiles hold all keys, -dlse alone.
  void load_delta(const BackwardTask& t, int64_t first, int64_t n, F* delta) const {
    if (whole_) {
      memset(delta, 0, static_cast<size_t>(n) * sizeof(F));
    } else {
      const Rows out = rows_of(p_.out, storage_, t.b, t.kv_head, p_.group());
      const Rows dout = rows_of(p_.dout, storage_, t.b, t.kv_head, p_.group());
      storage_.dot(out, dout, first, static_cast<int>(n), shape_.dim_v, delta);
    }
    if (p_.dlse) for_numbers(t, first, n, [&](int64_t r, int64_t at) { delta[r] -= p_.dlse.as<F>()[at]; });
  }

  // lse + lse_low of rows first .. first + n, base 2; +inf for a row that sees nothing.
  void load_lse(const BackwardTask& t, int64_t first, int64_t n, F* lse, F* lse_low) const {
    const F* x = p_.lse.as<F>() + (t.b * p_.heads() + t.kv_head) * p_.n_queries() + first;
    if (p_.group() > 1) {
      for_numbers(t, first, n, [&](int64_t r, int64_t at) { lse[r] = p_.lse.as<F>()[at]; });
      x = lse;
    }
    const F infinite = static_cast<F>(__builtin_inff());
    for (int64_t r = 0; r < n; ++r) {  // without branches: vectorised
      F high, low;
      split_lse(x[r], high, low);
      const bool none = x[r] == -infinite;
      lse[r] = none ? infinite : high;
      lse_low[r] = none ? F(0) : low;
    }
  }

  // lse, lse_low and delta of rows first .. first + n, where the keys are several tiles.
  void prepare_rows(const BackwardTask& t, int64_t first, int64_t n, F* lse, F* lse_low, F* delta) const {
    load_lse(t, first, n, lse, lse_low);
    load_delta(t, first, n, delta);
    if (!lse_corrections_) return;
    const F* lacks = lse_corrections_ + (t.b * p_.kv_heads() + t.kv_head) * blocks_.rows + first;
    for (int64_t r = 0; r < n; ++r) lse_low[r] += lacks[r];
  }

  // What the log-sum-exps of a block of rows lack, to lse_corrections_.
  void correct_lse(Work& w, int64_t pair, int64_t block) const {
    const BackwardTask t{pair / p_.kv_heads(), pair % p_.kv_heads(), 0};
    const int64_t first = blocks_.first(block), queries = p_.n_queries();
    TileRows& tile = w.tile;
    tile.set_rows(p_.range, first, blocks_.rows_of(block), p_.group(), p_.n_keys());
    load_lse(t, first, tile.n, w.lse, w.lse_low);
    const Rows q_rows = rows_of(p_.q, storage_, t.b, t.kv_head, p_.group());
    const Rows k_rows = rows_of(p_.k, storage_, t.b, t.kv_head, 1);
    const Operand q =
        operand(q_in_place_, q_rows, q_rows.uniform_stride(queries), first, tile.n, shape_.dim, shape_.padded, w.q);
    alignas(kVectorBytes) F sums[kTileRows] = {};
    for (int64_t key = tile.keys_begin / kTileKeys * kTileKeys; key < tile.keys_end; key += kTileKeys) {
      const int64_t left = p_.n_keys() - key;
      tile.set_keys(key, left < kTileKeys ? static_cast<int>(left) : kTileKeys);
      w.modifiers.set_tile(t.b, t.kv_head, tile);
      storage_.transpose(k_rows, key, tile.n_keys, shape_.dim, score_factor<F>(p_), w.k_panels, shape_.panel);
      multiply_scores(tile, q.data, q.stride, w.k_panels, shape_.panel, shape_.dim, w.scores, shape_.stride, w.next,
                      [&](int r, int from, int to) { w.modifiers.prefetch(tile, r, from, to); });
      add_probabilities(tile, w.modifiers, w.lse, w.lse_low, w.scores, shape_.stride, sums);
    }
    for (int r = 0; r < tile.n; r += kWidth<F>) store(sums + r, lse_correction<F>(load(sums + r)));
    memcpy(lse_corrections_ + pair * blocks_.rows + first, sums, static_cast<size_t>(tile.n) * sizeof(F));
  }

  void key_tile(Work& w, const BackwardTask& t, int64_t index, F* dq, F* dbias) const {
    const int64_t key = index * kTileKeys, left = p_.n_keys() - key;
    const int keys = left < kTileKeys ? static_cast<int>(left) : kTileKeys;
    const Rows k_rows = rows_of(p_.k, storage_, t.b, t.kv_head, 1), v_rows = rows_of(p_.v, storage_, t.b, t.kv_head, 1);
    if (narrow_)
      aim_at_following(w, t, index);
    else
      w.next.aim_at(p_, {&p_.k, &p_.v, &p_.q, &p_.dout}, w.following.b, w.following.kv_head);
    storage_.transpose(k_rows, key, keys, shape_.dim, score_factor<F>(p_), w.k_panels, shape_.panel);
    storage_.transpose(v_rows, key, keys, shape_.dim_v, F(1), w.v_panels, shape_.panel);
    const Operand k = operand(k_in_place_, k_rows, k_rows.token_stride, key, keys, shape_.dim, shape_.padded, w.k);

    // The blocks of rows that see one of the keys; all of them if dQ is stored block by block.
    int64_t block = 0, end = blocks_.count();
    if (!whole_) {
      block = blocks_seeing(index).begin;
      end = blocks_seeing(index).end;
      store_blocks(w, t, block, dq);
    }
    // dK and dV that come from one block of rows are written where they belong, others are summed in scratch.
    const bool once = end - block == 1;
    const Rows dk_rows = rows_of(p_.dk, storage_, t.b, t.kv_head, 1), dv_rows = rows_of(p_.dv, storage_, t.b, t.kv_head, 1);
    Target<F> dk = {w.dk, shape_.padded, Update::kStore}, dv = {w.dv, shape_.padded_v, Update::kStore};
    const bool dk_in_place = once && k_in_place_, dv_in_place = once && v_in_place_;
    if (dk_in_place) dk = target_in<F>(p_.dk, dk_rows, p_.n_keys(), key, Update::kStore, nullptr);
    if (dv_in_place) dv = target_in<F>(p_.dv, dv_rows, p_.n_keys(), key, Update::kStore, nullptr);
    if (block >= end) {
      clear(w.dk, 0, keys * shape_.padded);
      clear(w.dv, 0, keys * shape_.padded_v);
    }
    for (; block < end; ++block, dk.update = dv.update = Update::kAdd) row_block(w, t, block, key, keys, k, dq, dbias, dk, dv);
    w.next.ask_rest();
    const F one = F(1);
    if (!dk_in_place)
      storage_.store(dk_rows, key, keys, shape_.dim, w.dk, shape_.padded, &one, 0, is_large(p_.dk, storage_.bytes));
    if (!dv_in_place)
      storage_.store(dv_rows, key, keys, shape_.dim_v, w.dv, shape_.padded_v, &one, 0, is_large(p_.dv, storage_.bytes));
  }

  void row_block(Work& w, const BackwardTask& t, int64_t block, int64_t key, int keys, const Operand& k, F* dq,
                 F* dbias, const Target<F>& dk, const Target<F>& dv) const {
    const int64_t group = p_.group(), first = blocks_.first(block);
    const bool begins = !whole_ && block >= w.begun;
    if (begins) w.begun = block + 1;
    TileRows& tile = w.tile;
    tile.set_rows(p_.range, first, blocks_.rows_of(block), group, p_.n_keys());
    tile.set_keys(key, keys);
    w.modifiers.set_tile(t.b, t.kv_head, tile);
    const Rows q_rows = rows_of(p_.q, storage_, t.b, t.kv_head, group);
    const Rows dout_rows = rows_of(p_.dout, storage_, t.b, t.kv_head, group);
    const int64_t queries = p_.n_queries();
    const Operand q =
        operand(q_in_place_, q_rows, q_rows.uniform_stride(queries), first, tile.n, shape_.dim, shape_.padded, w.q);
    const Operand dout = operand(dout_in_place_, dout_rows, dout_rows.uniform_stride(queries), first, tile.n,
                                 shape_.dim_v, shape_.padded_v, w.dout);
    const TileBiasGradient<F> bias = bias_gradient(t, dbias);

    const int64_t stride = shape_.stride;
    multiply_scores(tile, q.data, q.stride, w.k_panels, shape_.panel, shape_.dim, w.scores, stride,
                    w.next, [&](int r, int from, int to) { w.modifiers.prefetch(tile, r, from, to); });
    multiply_scores(tile, dout.data, dout.stride, w.v_panels, shape_.panel, shape_.dim_v, w.dp, stride,
                    w.next, [&](int r, int from, int to) { bias.prefetch(tile, r, from, to); });
    if (whole_) {
      load_lse(t, first, tile.n, w.lse, w.lse_low);
      load_delta(t, first, tile.n, w.delta);
      w.rows.lse = w.lse;
      w.rows.lse_low = w.lse_low;
      w.rows.delta = w.delta;
      gradient_tile<true>(tile, w.modifiers, w.rows, bias, w.scores, w.dp, stride);
    } else {
      w.rows.lse = w.lse + slot(block);
      w.rows.lse_low = w.lse_low + slot(block);
      w.rows.delta = w.delta + slot(block);
      if (begins) prepare_rows(t, first, tile.n, w.lse + slot(block), w.lse_low + slot(block), w.delta + slot(block));
      gradient_tile<false>(tile, w.modifiers, w.rows, bias, w.scores, w.dp, stride);
    }
    multiply_keys(tile, w.scores, stride, dout.data, dout.stride, shape_.dim_v, dv, w.next);
    multiply_keys(tile, w.dp, stride, q.data, q.stride, shape_.dim, dk, w.next);
    Target<F> dq_target = {whole_ ? dq : dq + slot(block) * shape_.padded, shape_.padded,
                           whole_ || begins ? Update::kStore : Update::kAdd};
    if (dq_in_place_) {
      const Rows rows = rows_of(p_.dq, storage_, t.b, t.kv_head, group);
      dq_target = target_in<F>(p_.dq, rows, queries, first, Update::kStore, nullptr);
    }
    multiply_rows(tile, w.dp, stride, k.data, k.stride, shape_.dim, dq_target, w.next);
    if (whole_ && !dq_in_place_) store_dq(t, first, tile.n, dq);
  }

  TileBiasGradient<F> bias_gradient(const BackwardTask& t, F* dbias) const {
    const Tensor& g = p_.dbias;
    if (!g) return {};
    const bool once = p_.bias_of_pairs();
    const int64_t bytes = once ? g.element_bytes() : static_cast<int64_t>(sizeof(F));
    char* data = reinterpret_cast<char*>(dbias) + (t.b * g.stride[0] + t.kv_head * p_.group() * g.stride[1]) * bytes;
    return {data, g.stride[1], g.stride[2], g.stride[3], BiasSlots::from(p_), once, g.dtype, bytes};
  }

  Operand operand(bool in_place, const Rows& rows, int64_t stride, int64_t first, int n, int dim, int padded,
                  F* scratch) const {
    if (in_place) return {reinterpret_cast<const F*>(rows.data) + first * stride, stride};
    storage_.load(rows, first, n, dim, scratch, padded);
    return {scratch, padded};
  }

  void store_dq(const BackwardTask& t, int64_t first, int64_t n, const F* dq) const {
    const F one = F(1);
    storage_.store(rows_of(p_.dq, storage_, t.b, t.kv_head, p_.group()), first, static_cast<int>(n), shape_.dim, dq,
                   shape_.padded, &one, 0, is_large(p_.dq, storage_.bytes));
  }

  // In a parallel region: the partial sums of the splits, in order.
  void add_partial_dq() const {
    const int64_t blocks = blocks_.count(), tasks = plan_.pairs() * blocks;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t pair = i / blocks, block = i % blocks, first = blocks_.first(block);
      const int64_t count = static_cast<int64_t>(blocks_.rows_of(block)) * shape_.padded;
      F* sum = shared_ + pair * plan_.splits * dq_size() + first * shape_.padded;
      for (int64_t s = 1; s < plan_.splits; ++s) {
        const F* part = sum + s * dq_size();
        for (int64_t x = 0; x < count; x += kWidth<F>) store(sum + x, load(sum + x) + load(part + x));
      }
      store_dq({pair / p_.kv_heads(), pair % p_.kv_heads(), 0}, first, blocks_.rows_of(block), sum);
    }
  }

  const AttentionParams& p_;
  const Storage<F>& storage_;
  KernelShape<F> shape_;
  RowBlocks blocks_;
  int64_t key_tiles_;
  bool whole_;  // one tile holds all keys
  bool q_in_place_, dout_in_place_, k_in_place_, v_in_place_, dq_in_place_;
  int64_t dq_rows_;  // rows of dQ in scratch: all, those of the ring, or those of a block if the tile is whole
  int64_t ring_;     // blocks of rows in scratch at a time
  bool narrow_ = false;  // a window: few rows see a tile of keys
  BackwardPlan plan_;
  F* shared_ = nullptr;  // partial dQ, then copies of dbias
  F* bias_copies_ = nullptr;
  F* lse_corrections_ = nullptr;  // of all rows, if there are any
  ScratchLayout layout_;
  size_t tile_at_, scores_at_, dp_at_, k_panels_at_, v_panels_at_, k_at_, q_at_, dout_at_, dk_at_, dv_at_, lse_at_, lse_low_at_,
      delta_at_, keep_at_, slope_at_, additive_at_, dq_at_;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

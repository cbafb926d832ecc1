// The forward kernel: blocks of packed rows, tiles of keys, online softmax in base 2. Where there are fewer blocks than
// threads, the keys of each are cut into parts, whose sums are merged.
#pragma once
#include <new>

#include "../scratch.h"
#include "kernel_shape.h"
#include "softmax.h"
#include "storage.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

template <class F>
class Forward {
 public:
  Forward(const AttentionParams& p, const Storage<F>& storage)
      : p_(p), storage_(storage), shape_(p, forward_rows(p), kMostTileKeys), blocks_{p.n_queries() * p.group(), forward_rows(p)} {
    const Rows q = rows_of(p.q, storage, 0, 0, p.group());
    few_rows_ = blocks_.rows <= kFewRows;
    q_in_place_ = !few_rows_ && storage.native && q.uniform_stride(p.n_queries()) != 0;
    v_in_place_ = storage.native && shape_.dim_v == shape_.padded_v;
    out_in_place_ = v_in_place_ && rows_of(p.out, storage, 0, 0, p.group()).uniform_stride(p.n_queries()) != 0;

    splits_ = splits_of_keys(p);
    narrow_ = splits_ == 1 && blocks_.count() > 1 && blocks_see_one_tile();

    const auto part = [&](int64_t count) { return layout_.add(static_cast<size_t>(count) * sizeof(F)); };
    tile_at_ = layout_.add(sizeof(TileRows));
    const int64_t keys = round_up(shape_.keys, shape_.panel);
    scores_at_ = part(shape_.rows * shape_.stride);
    out_at_ = part(shape_.rows * shape_.padded_v);
    k_at_ = part(keys * shape_.padded);
    v_at_ = part(v_in_place_ ? 0 : keys * shape_.padded_v);
    q_at_ = part(q_in_place_ ? 0 : shape_.rows * shape_.padded);
    rows_at_ = part(5 * kTileRows);
    keep_at_ = part(kMostTileKeys);
    additive_at_ = part(TileModifiers<F>::additive_rows(p) * kMostTileKeys);
  }

  void run() {
    const int64_t blocks = blocks_.count(), tasks = p_.batch() * p_.kv_heads() * blocks;
    if (tasks == 0) return;
    if (splits_ > 1) return run_split(tasks);
    const int at_once = tasks_at_once(tasks);
#pragma omp parallel
    {
      Work w(*this, thread_scratch(ScratchUse::kTask, layout_.total()));
      // The heads in turn, the last (with a causal range: the longest) block of rows first.
      const auto run_task = [&](int64_t t) { block(w, t / blocks, blocks - 1 - t % blocks, nullptr); };
      if (narrow_) {  // blocks are alike, and each asks for the inputs of the one before: long runs
#pragma omp for schedule(guided)
        for (int64_t t = 0; t < tasks; ++t) run_task(t);
      } else {
#pragma omp for schedule(dynamic, at_once)
        for (int64_t t = 0; t < tasks; ++t) run_task(t);
      }
      stream_fence();
    }
  }

  // How many parts the keys are cut into: several where there are fewer tasks than threads, as in decoding.
  static int64_t splits_of_keys(const AttentionParams& p) {
    constexpr int64_t kLeastKeys = 4 * kTileKeys;  // of a part
    const int64_t tasks = p.batch() * p.kv_heads() * RowBlocks{p.n_queries() * p.group(), forward_rows(p)}.count();
    const int64_t threads = omp_get_max_threads();
    if (tasks == 0 || tasks >= threads) return 1;
    const int64_t wanted = (threads + tasks - 1) / tasks, most = p.n_keys() / kLeastKeys;
    return most < 1 ? 1 : wanted < most ? wanted : most;
  }

 private:
  // Up to so many rows, their scores are dot products with keys as they lie.
  static constexpr int kFewRows = 4;

  // Whether each block of rows sees so few keys (a window) that it takes them in one tile.
  bool blocks_see_one_tile() const {
    for (int64_t block = 0; block < blocks_.count(); ++block)
      if (const Keys keys = keys_of(block); keys.end - keys.begin > kMostTileKeys) return false;
    return true;
  }
  struct Keys {
    int64_t begin, end;
  };
  Keys keys_of(int64_t block) const {
    const int64_t first = blocks_.first(block), last = first + blocks_.rows_of(block) - 1;
    return {p_.range.lo.at(first / p_.group(), p_.n_keys()) / kKeyAlignment * kKeyAlignment,
            p_.range.hi.at(last / p_.group(), p_.n_keys())};
  }

  // Aims at what the task after (sequence, block) reads and this one does not.
  void aim_at_following(NextInputs& next, int64_t sequence, int64_t block) const {
    next.aim_at_nothing();
    int64_t known = keys_of(block).begin;  // the keys from here on are in the caches
    if (--block < 0) {
      block = blocks_.count() - 1;
      known = p_.n_keys();
      if (++sequence == p_.batch() * p_.kv_heads()) return;
    }
    const Keys keys = keys_of(block);
    const int64_t b = sequence / p_.kv_heads(), kv_head = sequence % p_.kv_heads(), group = p_.group();
    const int64_t end = keys.end < known ? keys.end : known, first = blocks_.first(block);
    next.also({&p_.k, &p_.v}, b, kv_head, 1, keys.begin, end);
    next.also({&p_.q}, b, kv_head * group, group, first / group, (first + blocks_.rows_of(block) - 1) / group + 1);
  }

  // What a thread works with.
  struct Work {
    TileRows& tile;
    int64_t split = 0;  // the part of the keys
    F *scores, *out, *k, *v, *q, *keep, *inverse;
    SoftmaxRows<F> rows;
    TileModifiers<F> modifiers;
    NextInputs next;

    Work(const Forward& f, char* scratch)
        : tile(*new (scratch + f.tile_at_) TileRows),
          scores(f.at(scratch, f.scores_at_)),
          out(f.at(scratch, f.out_at_)),
          k(f.at(scratch, f.k_at_)),
          v(f.at(scratch, f.v_at_)),
          q(f.at(scratch, f.q_at_)),
          keep(f.at(scratch, f.keep_at_)),
          inverse(f.at(scratch, f.rows_at_)),
          rows{inverse + kTileRows, inverse + 2 * kTileRows, inverse + 3 * kTileRows, inverse + 4 * kTileRows},
          modifiers(f.p_, f.at(scratch, f.additive_at_)) {}
  };
  F* at(char* scratch, size_t offset) const { return reinterpret_cast<F*>(scratch + offset); }

  // What a part of the keys leaves of a block of rows: sums relative to the largest score of each row.
  struct Part {
    F *out, *max, *sum;
  };
  int64_t part_size() const { return shape_.rows * shape_.padded_v + 2 * round_up(shape_.rows, kWidth<F>); }
  Part part_at(F* parts, int64_t index) const {
    F* out = parts + index * part_size();
    F* max = out + shape_.rows * shape_.padded_v;
    return {out, max, max + round_up(shape_.rows, kWidth<F>)};
  }

  // Every task cut into parts of its keys, which are merged in order: the result does not depend on who computed them.
  void run_split(int64_t tasks) const {
    const int64_t blocks = blocks_.count();
    F* parts = reinterpret_cast<F*>(
        thread_scratch(ScratchUse::kShared, static_cast<size_t>(tasks * splits_ * part_size()) * sizeof(F)));
#pragma omp parallel
    {
      Work w(*this, thread_scratch(ScratchUse::kTask, layout_.total()));
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tasks * splits_; ++t) {
        const Part part = part_at(parts, t);
        w.split = t % splits_;
        block(w, t / splits_ / blocks, t / splits_ % blocks, &part);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tasks; ++t) merge(w, t / blocks, t % blocks, parts, t * splits_);
      stream_fence();
    }
  }

  // The sums of the parts, relative to the largest score of all.
  void merge(Work& w, int64_t sequence, int64_t block_index, F* parts, int64_t first_part) const {
    TileRows& tile = w.tile;
    tile.set_rows(p_.range, blocks_.first(block_index), blocks_.rows_of(block_index), p_.group(), p_.n_keys());
    const F hidden = -static_cast<F>(__builtin_inff());
    for (int r = 0; r < tile.n; r += kWidth<F>) {
      Vec<F> most = set1(hidden), sum = zero<F>();
      for (int64_t s = 0; s < splits_; ++s) most = max(most, load(part_at(parts, first_part + s).max + r));
      const Vec<F> origin = select(most == hidden, zero<F>(), most);
      for (int64_t s = 0; s < splits_; ++s) {
        const Part part = part_at(parts, first_part + s);
        const Vec<F> factor = exp2(load(part.max + r) - origin);
        sum = fma(factor, load(part.sum + r), sum);
        store(part.max + r, factor);
      }
      store(w.rows.max + r, most);
      store(w.rows.sum + r, sum);
    }
    for (int r = 0; r < tile.n; ++r)
      for (int c = 0; c < shape_.padded_v; c += kWidth<F>) {
        const int64_t at = r * shape_.padded_v + c;
        Vec<F> sum = zero<F>();
        for (int64_t s = 0; s < splits_; ++s) {
          const Part part = part_at(parts, first_part + s);
          sum = fma(set1(part.max[r]), load(part.out + at), sum);
        }
        store(w.out + at, sum);
      }
    invert_sums(w);
    store_out(w, sequence / p_.kv_heads(), sequence % p_.kv_heads());
    store_lse(w, sequence / p_.kv_heads(), sequence % p_.kv_heads());
  }

  // With a part: the sums of the keys that belong to it; else the results.
  void block(Work& w, int64_t sequence, int64_t block_index, const Part* part) const {
    const int64_t b = sequence / p_.kv_heads(), kv_head = sequence % p_.kv_heads(), group = p_.group();
    const int64_t first = blocks_.first(block_index);
    const Rows q_rows = rows_of(p_.q, storage_, b, kv_head, group);
    const Rows k_rows = rows_of(p_.k, storage_, b, kv_head, 1), v_rows = rows_of(p_.v, storage_, b, kv_head, 1);
    TileRows& tile = w.tile;
    tile.set_rows(p_.range, first, blocks_.rows_of(block_index), group, p_.n_keys());

    const F* q = w.q;
    int64_t q_stride = shape_.padded;
    if (q_in_place_) {
      q_stride = q_rows.uniform_stride(p_.n_queries());
      q = reinterpret_cast<const F*>(q_rows.data) + first * q_stride;
    } else {
      storage_.load(q_rows, first, tile.n, shape_.dim, w.q, shape_.padded);
    }
    if (few_rows_) {
      const Vec<F> factor = set1(score_factor<F>(p_));
      for (int c = 0; c < tile.n * shape_.padded; c += kWidth<F>) store(w.q + c, load(w.q + c) * factor);
    }
    for (int r = 0; r < tile.n; r += kWidth<F>) {
      store(w.rows.max + r, set1(-static_cast<F>(__builtin_inff())));
      store(w.rows.sum + r, zero<F>());
    }

    if (narrow_)
      aim_at_following(w.next, sequence, block_index);
    else
      w.next.aim(p_, {&p_.k, &p_.q, &p_.v}, b, kv_head);
    int64_t keys_begin = tile.keys_begin, keys_end = tile.keys_end;
    if (part) {
      const auto cut = [&](int64_t s) {
        return s == splits_ ? tile.keys_end
                            : keys_begin + (tile.keys_end - keys_begin) * s / splits_ / kKeyAlignment * kKeyAlignment;
      };
      keys_end = cut(w.split + 1);
      keys_begin = cut(w.split);
    }
    F* const sums = part ? part->out : w.out;
    const int64_t all_keys = keys_end - keys_begin;
    const int most_keys = all_keys <= kMostTileKeys ? kMostTileKeys : kTileKeys;
    const bool direct = !part && out_in_place_ && all_keys > 0 && all_keys <= kMostTileKeys;
    Update update = Update::kStore;
    for (int64_t key = keys_begin; key < keys_end; key += most_keys) {
      const int64_t left = keys_end - key;
      const int keys = left < most_keys ? static_cast<int>(left) : most_keys;
      tile.set_keys(key, keys);
      w.modifiers.set_tile(b, kv_head, tile);
      if (few_rows_)
        storage_.dot_keys(k_rows, v_rows, key, keys, shape_.dim, w.q, shape_.padded, tile.n, w.scores, shape_.stride);
      else
        storage_.transpose(k_rows, key, keys, shape_.dim, score_factor<F>(p_), w.k, shape_.panel);
      const F* v = w.v;
      int64_t v_stride = shape_.padded_v;
      if (v_in_place_) {
        v_stride = v_rows.token_stride;
        v = reinterpret_cast<const F*>(v_rows.data) + key * v_stride;
      } else {
        storage_.load(v_rows, key, keys, shape_.dim_v, w.v, shape_.padded_v);
      }
      if (!few_rows_)
        multiply_scores(tile, q, q_stride, w.k, shape_.panel, shape_.dim, w.scores, shape_.stride, w.next,
                        [&](int r, int from, int to) { w.modifiers.prefetch(tile, r, from, to); });
      softmax_tile(tile, w.modifiers, w.scores, shape_.stride, w.keep, w.rows);
      Target<F> out = {sums, shape_.padded_v, update, w.rows.rescale};
      if (direct) {
        invert_sums(w);
        const Rows rows = rows_of(p_.out, storage_, b, kv_head, group);
        out = target_in(p_.out, rows, p_.n_queries(), first, Update::kScale, w.inverse);
      }
      multiply_rows(tile, w.scores, shape_.stride, v, v_stride, shape_.dim_v, out, w.next);
      update = Update::kRescale;
    }
    w.next.ask_rest();
    if (!direct && update == Update::kStore) clear(sums, 0, tile.n * shape_.padded_v);
    if (part) {
      for (int r = 0; r < tile.n; r += kWidth<F>) {
        store(part->max + r, load(w.rows.max + r));
        store(part->sum + r, load(w.rows.sum + r));
      }
      return;
    }
    if (!direct) {
      invert_sums(w);
      store_out(w, b, kv_head);
    }
    store_lse(w, b, kv_head);
  }

  void store_out(const Work& w, int64_t b, int64_t kv_head) const {
    storage_.store(rows_of(p_.out, storage_, b, kv_head, p_.group()), w.tile.first, w.tile.n, shape_.dim_v, w.out,
                   shape_.padded_v, w.inverse, 1, is_large(p_.out, storage_.bytes));
  }

  void store_lse(const Work& w, int64_t b, int64_t kv_head) const {
    const TileRows& tile = w.tile;
    F* lse = p_.lse.as<F>() + (b * p_.heads() + kv_head * p_.group()) * p_.n_queries();
    for (int r = 0; r < tile.n; ++r)
      lse[tile.head[r] * p_.n_queries() + tile.query[r]] = natural_lse(w.rows.max[r], w.rows.sum[r]);
  }

  // The factor of each row, 0 if it sees nothing; sums become their logarithms.
  void invert_sums(Work& w) const {
    for (int r = 0; r < w.tile.n; r += kWidth<F>) {
      const Vec<F> sum = load(w.rows.sum + r);
      const Mask<F> none = sum == F(0);
      store(w.inverse + r, select(none, zero<F>(), F(1) / sum));
      store(w.rows.sum + r, log2(sum));  // -inf for 0
    }
  }

  const AttentionParams& p_;
  const Storage<F>& storage_;
  KernelShape<F> shape_;
  RowBlocks blocks_;
  bool few_rows_, q_in_place_, v_in_place_, out_in_place_;
  int64_t splits_;  // of the keys of a task
  bool narrow_;     // blocks_see_one_tile
  ScratchLayout layout_;
  size_t tile_at_, scores_at_, out_at_, k_at_, v_at_, q_at_, rows_at_, keep_at_, additive_at_;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

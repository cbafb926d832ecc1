// The forward kernel: one query at a time, whose heads that share a choice of blocks are the rows; the keys it visits
// are columns, as many at a time as scores fit the caches; online softmax in base 2.
#pragma once
#include <omp.h>

#include "../attention/softmax.h"
#include "../scratch.h"
#include "gathered_products.h"
#include "keys.h"
#include "visits.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

constexpr int kSelectedRows = 128;     // heads of a tile at most
constexpr int kQueriesOfTask = 32;     // neighbours: they share some of what they visit
constexpr int kScoresBytes = 1 << 16;  // of a tile; on top of the keys' tiles, in the second-level cache

// E: what products multiply (operands.h).
template <class E>
class SelectedForward {
  using O = Operands<E>;
  using F = typename O::Sum;
  static constexpr int W = kWidth<F>, kTerms = O::kTerms;

 public:
  SelectedForward(const SelectedParams& p, const Storage<F>& storage)
      : p_(p),
        storage_(storage),
        k_(p.k, storage, static_cast<F>(p.scale * kLog2E), true, false),
        v_(p.v, storage, F(1), false, true) {
    const int64_t heads = p.group() / p.choices();
    rows_ = static_cast<int>(heads < kSelectedRows ? heads : kSelectedRows);
    const int64_t visited = (p.named() + 1) * p.block_size;  // by a query at most, and there are n_keys
    const int64_t most = (visited < p.n_keys() ? visited : p.n_keys()) / W + p.named() + 2;
    const int64_t fit = kScoresBytes / static_cast<int>(sizeof(F)) / W / rows_;
    tiles_ = static_cast<int>(fit < most ? (fit < 8 ? 8 : fit) : most);
    stride_ = tiles_ * W + W;  // off the powers of two
    prepared_ = p.n_queries() * p.choices() * visited > p.n_keys();

    static_assert(sizeof(E) == sizeof(F));
    q_in_place_ = O::in_place(storage);
    const auto part = [&](int64_t count) { return layout_.add(static_cast<size_t>(count) * sizeof(F)); };
    const int state = round_up(rows_, W);
    scores_at_ = part(rows_ * stride_);
    out_at_ = part(rows_ * v_.padded());
    q_at_ = part(q_in_place_ ? 0 : rows_ * O::row_stride(k_.dim()));
    rounded_at_ = part(kTerms == 1 ? 0 : rows_ * stride_ / kTerms);
    state_at_ = part(5 * state);
    tiles_at_ = layout_.add(tiles_ * sizeof(E*));
    runs_at_ = layout_.add(tiles_ * sizeof(Run<E>));
    columns_at_ = layout_.add(tiles_ * sizeof(Span));
    weights_at_ = part(tiles_);
    k_at_ = part(prepared_ ? 0 : tiles_ * k_.tile_size());
    v_at_ = part(prepared_ || v_.in_place() ? 0 : static_cast<int64_t>(tiles_) * W / kTerms * v_.padded());
    seen_at_ = layout_.add(static_cast<size_t>(p.blocks()) * sizeof(int32_t));
  }

  void run() {
    const int64_t pairs = p_.batch() * p_.kv_heads(), queries = p_.n_queries();
    if (pairs * queries == 0) return;
    const int64_t size = prepared_ ? k_.size() + v_.size() : 0;
    const int64_t wave = pairs_at_once(pairs, size * static_cast<int64_t>(sizeof(F)));
    E* copies = nullptr;
    if (size)
      copies = reinterpret_cast<E*>(
          thread_scratch(ScratchUse::kShared, static_cast<size_t>(wave * size) * sizeof(F)));
    const int64_t parts = (queries + kQueriesOfTask - 1) / kQueriesOfTask;
#pragma omp parallel
    {
      Work w(*this, thread_scratch(ScratchUse::kTask, layout_.total()));
      for (int64_t first = 0; first < pairs; first += wave) {
        const int64_t count = pairs - first < wave ? pairs - first : wave;
        if (size) prepare_pairs<E, 2>({&k_, &v_}, p_.kv_heads(), p_.n_keys(), first, count, copies, size);
        // The last queries first: with a causal choice they visit most.
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < count * parts; ++t) {
          const int64_t pair = first + t / parts, begin = (parts - 1 - t % parts) * kQueriesOfTask;
          const int64_t end = begin + kQueriesOfTask < queries ? begin + kQueriesOfTask : queries;
          w.aim(*this, pair, copies + t / parts * size);
          for (int64_t i = begin; i < end; ++i) query(w, i);
        }
      }
    }
  }

 private:
  // What a thread works with.
  struct Work {
    F *scores, *out, *inverse;
    E *q, *rounded;   // queries, probabilities: where products cannot read them as they are
    SoftmaxRows<F> rows;
    const E** tiles;  // of keys, in the order of the columns
    Run<E>* runs;     // of values, one for each visit
    Span* columns;    // of the visits: the scores that are theirs
    F* weights;       // of the runs
    E *k, *v;         // a visit's own tiles and rows
    VisitWalker walker;
    int n_tiles = 0, n_runs = 0;
    int64_t b = 0, kv_head = 0;
    Rows v_rows{};
    const E *k_copy = nullptr, *v_copy = nullptr;

    Work(const SelectedForward& f, char* scratch)
        : scores(at<F>(scratch, f.scores_at_)),
          out(at<F>(scratch, f.out_at_)),
          inverse(at<F>(scratch, f.state_at_)),
          q(at<E>(scratch, f.q_at_)),
          rounded(at<E>(scratch, f.rounded_at_)),
          tiles(at<const E*>(scratch, f.tiles_at_)),
          runs(at<Run<E>>(scratch, f.runs_at_)),
          columns(at<Span>(scratch, f.columns_at_)),
          weights(at<F>(scratch, f.weights_at_)),
          k(at<E>(scratch, f.k_at_)),
          v(at<E>(scratch, f.v_at_)),
          walker(f.p_, reinterpret_cast<int32_t*>(scratch + f.seen_at_)) {
      const int state = round_up(f.rows_, W);
      rows = {inverse + state, inverse + 2 * state, inverse + 3 * state, inverse + 4 * state};
    }
    template <class T>
    static T* at(char* scratch, size_t offset) {
      return reinterpret_cast<T*>(scratch + offset);
    }
    void aim(const SelectedForward& f, int64_t pair, const E* copies) {
      b = pair / f.p_.kv_heads();
      kv_head = pair % f.p_.kv_heads();
      v_rows = f.v_.head(b, kv_head);
      k_copy = copies;
      v_copy = copies + f.k_.size();
    }
  };

  void query(Work& w, int64_t i) const {
    const int64_t choices = p_.choices(), heads = p_.group() / choices;
    for (int64_t c = 0; c < choices; ++c)
      for (int64_t h = 0; h < heads; h += rows_)
        tile(w, i, w.kv_head * choices + c, c * heads + h, static_cast<int>(heads - h < rows_ ? heads - h : rows_));
  }

  // n heads of the group from `head` on, by the choice of blocks `choice`.
  void tile(Work& w, int64_t i, int64_t choice, int64_t head, int n) const {
    const int64_t group = p_.group();
    const Rows q_rows = rows_of(p_.q, storage_, w.b, w.kv_head, group);
    const E* q = w.q;
    int64_t q_stride = O::row_stride(k_.dim());
    if (q_in_place_) {
      q = reinterpret_cast<const E*>(q_rows.data) + i * q_rows.token_stride + head * q_rows.head_stride;
      q_stride = q_rows.head_stride;
    } else {
      O::load_rows(storage_, q_rows, i * group + head, n, k_.dim(), w.q);
    }
    for (int r = 0; r < n; r += W) {
      store(w.rows.max + r, set1(-static_cast<F>(__builtin_inff())));
      store(w.rows.sum + r, zero<F>());
    }

    Update update = Update::kStore;
    w.n_tiles = w.n_runs = 0;
    const auto flush = [&] {
      if (w.n_tiles == 0) return;
      multiply_tile_list<E>(n, q, q_stride, w.tiles, w.n_tiles, k_.dim(), static_cast<F>(p_.scale * kLog2E), w.scores,
                            stride_);
      softmax(w, n);
      multiply_run_list<E>(n, probabilities(w, n), stride_ / kTerms, w.runs, w.n_runs, v_.row_stride(), v_.dim(),
                           {w.out, v_.padded(), update, w.rows.rescale});
      update = Update::kRescale;
      w.n_tiles = w.n_runs = 0;
    };
    w.walker.walk(w.b, choice, i, [&](const Visit& visit) {
      const F weight = weight_of<F>(p_, w.b, choice, i, visit.slot);
      for (int64_t key = visit.key, end = visit.key + visit.keys; key < end;) {
        if (w.n_tiles == tiles_) flush();
        key += take(w, key, end - key, weight);
      }
    });
    flush();

    if (update == Update::kStore) clear(w.out, 0, n * v_.padded());
    for (int r = 0; r < n; r += W) {
      const Vec<F> sum = load(w.rows.sum + r);
      const Mask<F> none = sum == F(0);
      store(w.inverse + r, select(none, zero<F>(), F(1) / sum));
      store(w.rows.sum + r, log2(sum));  // -inf for 0
    }
    storage_.store(rows_of(p_.out, storage_, w.b, w.kv_head, group), i * group + head, n, v_.dim(), w.out, v_.padded(),
                   w.inverse, 1, false);
    F* lse = p_.lse.as<F>() + (w.b * p_.heads() + w.kv_head * group + head) * p_.n_queries() + i;
    for (int r = 0; r < n; ++r) lse[r * p_.n_queries()] = natural_lse(w.rows.max[r], w.rows.sum[r]);
  }

  // Adds keys from `key` on to the columns, as many as there is room for; returns how many.
  int64_t take(Work& w, int64_t key, int64_t left, F weight) const {
    const int lead = prepared_ ? static_cast<int>(key % W) : 0;  // columns before the first key
    const int64_t room = static_cast<int64_t>(tiles_ - w.n_tiles) * W - lead;
    const int terms = static_cast<int>(left < room ? left : room), count = (lead + terms + W - 1) / W;
    const int at = w.n_tiles * W + lead;
    const E* v = v_.row(w.v_copy, w.v_rows, key);
    if (!prepared_) {
      E* own = w.k + w.n_tiles * k_.tile_size();
      k_.make_tiles(w.b, w.kv_head, key, terms, own);
      for (int t = 0; t < count; ++t) w.tiles[w.n_tiles + t] = own + t * k_.tile_size();
      if (!v_.in_place()) {
        E* rows = w.v + static_cast<int64_t>(w.n_tiles) * W / kTerms * v_.padded();
        v_.make_rows(w.b, w.kv_head, key, terms, rows);
        v = rows;
      }
    } else {
      for (int t = 0; t < count; ++t) w.tiles[w.n_tiles + t] = k_.tile(w.k_copy, key / W + t);
    }
    // A pair that the visit begins or ends in the middle of meets a probability of 0.
    w.runs[w.n_runs] = {v, at / kTerms, O::terms(at % kTerms + terms)};
    w.columns[w.n_runs] = {at, at + terms};
    w.weights[w.n_runs] = weight;
    ++w.n_runs;
    w.n_tiles += count;
    return terms;
  }

  // One step of the online softmax for n rows: scores become 2^(score - max), zeros where not visible.
  void softmax(Work& w, int n) const {
    const F hidden = -static_cast<F>(__builtin_inff());
    const int end = w.n_tiles * W;
    for (int r = 0; r < n; ++r) {
      F* scores = w.scores + r * stride_;
      for (int i = 0; i < w.n_runs; ++i) {
        const int from = w.columns[i].begin, to = w.columns[i].end;
        if (p_.weights) {
          const Vec<F> weight = set1(w.weights[i]);
          for (int j = from / W * W; j < to; j += W) store(scores + j, load(scores + j) * weight);
        }
        hide_outside(scores, from, to, hidden);
      }
      Vec<F> most = load(scores), most_2 = load(scores + end - W);
      for (int j = W; j + 2 * W <= end; j += 2 * W) {
        most = max(most, load(scores + j));
        most_2 = max(most_2, load(scores + j + W));
      }
      w.rows.origin[r] = reduce_max(max(most, most_2));
    }
    for (int r = 0; r < n; r += W) {
      const Vec<F> before = load(w.rows.max + r), now = max(before, load(w.rows.origin + r));
      const Vec<F> origin = select(now == hidden, zero<F>(), now);
      const Vec<F> rescale = select(before == now, set1(F(1)), exp2(before - origin));
      store(w.rows.max + r, now);
      store(w.rows.origin + r, origin);
      store(w.rows.rescale + r, rescale);
      store(w.rows.sum + r, load(w.rows.sum + r) * rescale);
    }
    for (int r = 0; r < n; ++r) {
      F* scores = w.scores + r * stride_;
      const Vec<F> origin = set1(w.rows.origin[r]);
      Vec<F> sum = zero<F>(), sum_2 = zero<F>();
      int j = 0;
      for (; j + 2 * W <= end; j += 2 * W) {
        const Vec<F> x = exp2(load(scores + j) - origin), y = exp2(load(scores + j + W) - origin);
        store(scores + j, x);
        store(scores + j + W, y);
        sum += x;
        sum_2 += y;
      }
      if (j < end) {
        const Vec<F> x = exp2(load(scores + j) - origin);
        store(scores + j, x);
        sum += x;
      }
      w.rows.sum[r] += reduce_add(sum + sum_2);
    }
  }

  // The numerators of n rows as products read them.
  const E* probabilities(Work& w, int n) const {
    if constexpr (kTerms == 1) {
      return w.scores;
    } else {
      for (int r = 0; r < n; ++r)
        O::round_row(w.scores + r * stride_, w.n_tiles * W, w.rounded + r * (stride_ / kTerms));
      return w.rounded;
    }
  }

  const SelectedParams& p_;
  const Storage<F>& storage_;
  KeySide<E> k_, v_;
  int rows_, tiles_;  // of a tile of scores, at most
  int64_t stride_;    // of rows of scores
  bool prepared_, q_in_place_;
  ScratchLayout layout_;
  size_t scores_at_, out_at_, q_at_, rounded_at_, columns_at_, state_at_, tiles_at_, runs_at_, weights_at_, k_at_, v_at_, seen_at_;
};

}  // namespace
}  // namespace HK_ISA
}  // namespace hierkernels

// The kernel that chooses key blocks. A task is up to kQueries queries that choose for one head (or the group of heads
// that choose together), a lane each. Tiles of windows are scored, summed to blocks and offered to the queries' lists.
#pragma once
#include <omp.h>

#include "../attention/kernel_shape.h"
#include "../scratch.h"
#include "select_blocks.h"
#include "top_blocks.h"
#include "window_scores.h"

namespace hierkernels {
namespace HK_ISA {
namespace {

// Queries of a task, and windows of a tile unless a block has more: what they score stays in the caches.
constexpr int kQueries = 64;
constexpr int kTileWindows = 128;

// E: what the products of queries and windows multiply (operands.h).
template <class E>
class Select {
  using O = Operands<E>;
  using F = Sum<E>;
  using Index = typename Simd<F>::Signed;
  static constexpr int W = kWidth<F>;
  static_assert(kQueries % kPanel<F> == 0);
  static constexpr F kNoBlock = -1000;  // the logit that stands for no block

 public:
  Select(const SelectParams& p, const Storage<F>& storage)
      : p_(p),
        storage_(storage),
        k_storage_(p.lse ? storage : storage_of<F, F>()),
        dim_(static_cast<int>(p.dim())),
        padded_(round_up(dim_, W)),
        n_(static_cast<int>(p.num_selected)),
        halo_(p.chunks_per_window - 1),
        tile_blocks_(p.windows_per_block < kTileWindows ? kTileWindows / p.windows_per_block : 1) {
    const auto part = [&](int64_t count) { return layout_.add(static_cast<size_t>(count) * sizeof(F)); };
    rows_ = tile_blocks_ * p.windows_per_block + halo_;
    q_at_ = part(scored_heads() * head_size());
    rows_at_ = part(probability() ? 0 : 2 * kQueries * padded_);
    lse_at_ = part(scored_heads() * kQueries);
    k_at_ = part(O::in_place(k_storage_) ? 0 : rows_ * O::row_stride(dim_));
    windows_at_ = part(rows_ * kQueries);
    scores_at_ = part(static_cast<int64_t>(n_) * kQueries);
    blocks_at_ = part(static_cast<int64_t>(n_) * kQueries);
    weights_at_ = part(p.windows_per_block + halo_);
    total_at_ = part(2 * kQueries);
    ends_at_ = part(3 * kQueries);
  }

  void run() {
    const int64_t parts = (p_.n_queries() + kQueries - 1) / kQueries;
    const int64_t tasks = p_.q.size[0] * p_.heads * parts;
    if (tasks == 0 || n_ == 0) return;
    const int at_once = tasks_at_once(tasks);
#pragma omp parallel
    {
      Work w(*this, thread_scratch(ScratchUse::kTask, layout_.total()));
      // The last part of a head first: with a causal range it is the longest.
#pragma omp for schedule(dynamic, at_once)
      for (int64_t t = 0; t < tasks; ++t) {
        const Task now = task_at(t, parts);
        int64_t next = t + 1;
        if (next % at_once == 0) next += (omp_get_num_threads() - 1) * at_once;  // if the threads keep step
        next < tasks ? aim(w, task_at(next, parts)) : w.next.aim_at_nothing();
        task(w, now.batch, now.head, now.first);
        w.next.ask_rest();
      }
    }
  }

 private:
  struct Work {
    E *q, *k;
    F *rows, *lse, *windows, *scores, *weights;
    Index* blocks;
    F *maximum, *sum;            // of the logits' softmax
    Index *visible, *end, *own;  // of each query: the windows and the blocks below which it sees, and its block
    int queries;
    NextInputs next;  // the queries of the next task

    Work(const Select& s, char* scratch)
        : q(at<E>(scratch, s.q_at_)),
          k(at<E>(scratch, s.k_at_)),
          rows(at<F>(scratch, s.rows_at_)),
          lse(at<F>(scratch, s.lse_at_)),
          windows(at<F>(scratch, s.windows_at_)),
          scores(at<F>(scratch, s.scores_at_)),
          weights(at<F>(scratch, s.weights_at_)),
          blocks(at<Index>(scratch, s.blocks_at_)),
          maximum(at<F>(scratch, s.total_at_)),
          sum(maximum + kQueries),
          visible(at<Index>(scratch, s.ends_at_)),
          end(visible + kQueries),
          own(end + kQueries) {
      // In how many chunks a window overlaps a block, from the first window that does to the last.
      const int64_t r = s.p_.windows_per_block, c = s.p_.chunks_per_window;
      for (int64_t i = 0; i < r + c - 1; ++i) {
        int64_t common = i + 1 < r + c - 1 - i ? i + 1 : r + c - 1 - i;
        common = common < r ? common : r;
        weights[i] = static_cast<F>(common < c ? common : c);
      }
    }
    template <class T>
    static T* at(char* scratch, size_t offset) {
      return reinterpret_cast<T*>(scratch + offset);
    }
    TopBlocks<F> list(int lane, int n) const { return {scores + lane, blocks + lane, kQueries, n}; }
  };

  struct Task {
    int64_t batch, head, first;
  };
  Task task_at(int64_t t, int64_t parts) const {
    const int64_t head = t / parts;
    return {head / p_.heads, head % p_.heads, (parts - 1 - t % parts) * kQueries};
  }
  void aim(Work& w, const Task& task) const {
    const Rows rows = rows_of(p_.q, storage_, task.batch, task.head, p_.merged);
    const int64_t left = p_.n_queries() - task.first, bytes = storage_.bytes;
    w.next.aim(rows.data + task.first * rows.token_stride * bytes, rows.head_stride * bytes, rows.token_stride * bytes,
               p_.merged, left < kQueries ? left : kQueries, dim_ * bytes);
  }

  // The queries of a head in tiles.
  int64_t head_size() const { return kQueries / W * O::tile_size(dim_); }
  bool probability() const { return static_cast<bool>(p_.lse); }
  // Probabilities are summed over the heads; of logits, it is the queries that are averaged.
  int64_t scored_heads() const { return probability() ? p_.merged : 1; }
  // The first window that overlaps block j but none before it.
  int64_t first_window(int64_t j) const { return j * p_.windows_per_block - p_.first_chunk; }

  void task(Work& w, int64_t b, int64_t head, int64_t first) const {
    const int64_t left = p_.n_queries() - first;
    w.queries = left < kQueries ? static_cast<int>(left) : kQueries;
    set_queries(w, first);
    // Where all candidates are chosen, their probabilities do not matter.
    const bool scored = !probability() || w.end[w.queries - 1] > n_;
    if (scored) load_queries(w, b, head, first);
    choose(w, b, head, scored, false);
    // The softmax over logits only tells which blocks are too improbable; mostly it is plain that none is.
    const bool with_sums = !probability() && !surely_probable(w);
    if (with_sums) choose(w, b, head, scored, true);
    finish(w, b, head, first, with_sums);
  }

  // Fills the lists; with_sums: and the maximum and sum of the softmax over logits.
  void choose(Work& w, int64_t b, int64_t head, bool scored, bool with_sums) const {
    const int64_t end = w.end[w.queries - 1];
    for (int lane = 0; lane < w.queries; lane += W) w.list(lane, n_).clear();
    for (int64_t j = 0; j < end; j += tile_blocks_) {
      const int64_t tile_end = j + tile_blocks_ < end ? j + tile_blocks_ : end;
      if (scored) score_tile(w, b, head, j, tile_end);
      for (int lane = 0; lane < w.queries; lane += W) {
        if (with_sums) add_logits(w, lane, j, tile_end);
        offer(w, lane, j, tile_end, scored);
      }
      if (halo_ > 0) {
        const size_t row = kQueries * sizeof(F);
        __builtin_memmove(w.windows, w.windows + tile_blocks_ * p_.windows_per_block * kQueries, halo_ * row);
      }
    }
  }

  // Whether each listed block is above the least probability even if all candidates' logits equal the greatest.
  bool surely_probable(const Work& w) const {
    constexpr double kLogLeast = -23.0;  // ln(1e-10), rounded up
    const Vec<F> margin = set1(static_cast<F>(::log(static_cast<double>(p_.num_blocks + 1)) + kLogLeast));
    for (int lane = 0; lane < w.queries; lane += W) {
      const TopBlocks<F> list = w.list(lane, n_);
      const Vec<F> bound = max(load(list.scores), set1(kNoBlock)) + margin;
      if (list.has_within(bound)) return false;
    }
    return true;
  }

  void set_queries(Work& w, int64_t first) const {
    fill(p_.visible, first, p_.n_windows(), w.queries, w.visible);
    fill(p_.candidates, first, p_.num_blocks, w.queries, w.end);
    fill({p_.query_offset, p_.block_size, 1, 0, 0}, first, INT64_MAX, w.queries, w.own);
    for (int lane = 0; lane < kQueries; ++lane) {
      w.maximum[lane] = kNoBlock;
      w.sum[lane] = F(1);
    }
  }

  // s.at(first + lane), with one division; lanes beyond the queries repeat the last.
  static void fill(const Staircase& s, int64_t first, int64_t most, int queries, Index* to) {
    int64_t steps = (first + s.shift) / s.step, rest = (first + s.shift) % s.step;
    for (int lane = 0; lane < kQueries; ++lane) {
      int64_t x = steps * s.rise + s.offset;
      if (x < s.floor) x = s.floor;
      to[lane] = lane < queries ? static_cast<Index>(x < most ? x : most) : to[lane - 1];
      if (++rest == s.step) {
        rest = 0;
        ++steps;
      }
    }
  }

  // The mean over the heads of each query, in panels.
  void average_queries(Work& w, int64_t b, int64_t head, int64_t first) const {
    F* const other = w.rows + kQueries * padded_;
    for (int64_t h = 0; h < p_.merged; ++h) {
      const Rows rows = rows_of(p_.q, storage_, b, head * p_.merged + h, 1);
      storage_.load(rows, first, w.queries, dim_, h == 0 ? w.rows : other, padded_);
      for (int64_t x = 0; h > 0 && x < w.queries * padded_; x += W) store(w.rows + x, load(w.rows + x) + load(other + x));
    }
    transpose_rows<F, F>({reinterpret_cast<char*>(w.rows), padded_, 0, 1}, 0, w.queries, dim_, F(1) / p_.merged, w.q,
                         kPanel<F>);
  }

  // The queries of each head in panels, channel by channel, and their lse in base 2.
  void load_queries(Work& w, int64_t b, int64_t head, int64_t first) const {
    if constexpr (O::kTerms == 1)
      if (!probability()) return average_queries(w, b, head, first);
    for (int64_t h = 0; h < p_.merged; ++h) {
      const int64_t q_head = head * p_.merged + h;
      const Rows rows = rows_of(p_.q, storage_, b, q_head, 1);
      if constexpr (O::kTerms == 1)
        storage_.transpose(rows, first, w.queries, dim_, F(1), w.q + h * head_size(), kPanel<F>);
      else
        O::make_tiles(storage_, rows, first, w.queries, dim_, F(1), w.q + h * head_size());
      const F* lse = p_.lse.as<F>() + (b * p_.q.size[1] + q_head) * p_.n_queries() + first;
      for (int lane = 0; lane < kQueries; ++lane)
        w.lse[h * kQueries + lane] = lane < w.queries ? static_cast<F>(lse[lane] * kLog2E) : F(0);
    }
  }

  // Row of window x in the tile that starts with block j: the last halo_ windows of the tile before come first.
  int64_t row(int64_t x, int64_t j) const { return x - first_window(j) + halo_; }

  void score_tile(Work& w, int64_t b, int64_t head, int64_t j, int64_t tile_end) const {
    int64_t begin = j == 0 ? 0 : first_window(j), end = first_window(tile_end);
    if (begin < 0) begin = 0;
    if (end > w.visible[w.queries - 1]) end = w.visible[w.queries - 1];
    if (begin >= end) return;
    const Rows keys = rows_of(p_.k, k_storage_, b, head * p_.merged * p_.k.size[1] / p_.q.size[1], 1);
    const E* k = w.k;
    int64_t k_stride = O::row_stride(dim_);
    if (O::in_place(k_storage_)) {
      k_stride = keys.token_stride;
      k = reinterpret_cast<const E*>(keys.data) + begin * k_stride;
    } else {
      O::load_rows(k_storage_, keys, begin, static_cast<int>(end - begin), dim_, w.k);
    }
    // Panels of numbers, channel by channel, or tiles of pairs.
    const int64_t q_stride = O::kTerms == 1 ? kPanel<F> : W, q_column = O::kTerms == 1 ? W : O::tile_size(dim_);
    const F scale = static_cast<F>(probability() ? p_.scale * kLog2E : p_.scale);
    for (int lane = 0; lane < w.queries; lane += kPanel<F>) {
      const int lanes = w.queries - lane < kPanel<F> ? w.queries - lane : kPanel<F>;
      const int columns = (lanes + W - 1) / W;
      const int64_t all_see = w.visible[lane], last = w.visible[lane + lanes - 1];
      const int windows = static_cast<int>((last < end ? last : end) - begin);
      if (windows <= 0) continue;
      for (int64_t h = 0; h < scored_heads(); ++h)
        for_each_part(windows, kMaxRows[columns], [&](int x, int count) {
          const bool edge = begin + x + count > all_see;
          score_windows<E>(count, columns,
                           {k + x * k_stride, k_stride, w.q + h * head_size() + lane / W * O::tile_size(dim_), q_stride,
                            q_column, O::terms(dim_), scale,
                            probability() ? w.lse + h * kQueries + lane : nullptr,
                            w.windows + row(begin + x, j) * kQueries + lane, kQueries, h > 0, begin + x,
                            edge ? w.visible + lane : nullptr, w.next.take(dim_, k)});
        });
    }
  }

  // The candidates j for which nothing depends on the query, in a vector of queries.
  struct Plain {
    int64_t begin, end;
    bool has(int64_t j) const { return begin <= j && j < end; }
  };
  Plain plain_blocks(const Work& w, int lane) const {
    int64_t end = w.end[lane];
    if (p_.exclude_own_block && w.own[lane] < end) end = w.own[lane];
    const int64_t local = w.own[lane] - p_.num_local + 1;
    return {p_.num_initial, p_.num_local > 0 && local < end ? local : end};
  }
  Mask<F> allowed(const Work& w, int lane, int64_t j) const {
    const Mask<F> block = set1_lanes<F>(j), before_end = block < load_lanes<F>(w.end + lane);
    return p_.exclude_own_block ? before_end & (block != load_lanes<F>(w.own + lane)) : before_end;
  }
  int last_lane(const Work& w, int lane) const { return lane + W <= w.queries ? lane + W - 1 : w.queries - 1; }

  // The tile's logits in the softmax's maximum and sum; hides those that are no candidates, and NaN.
  void add_logits(Work& w, int lane, int64_t first, int64_t tile_end) const {
    if (tile_end > w.end[last_lane(w, lane)]) tile_end = w.end[last_lane(w, lane)];
    const Plain plain = plain_blocks(w, lane);
    const Vec<F> hidden = set1(-static_cast<F>(__builtin_inff())), log2e = set1(static_cast<F>(kLog2E));
    const Vec<F> before = load(w.maximum + lane);
    Vec<F> most = before;
    for (int64_t j = first; j < tile_end; ++j) {
      F* at = w.windows + row(j, first) * kQueries + lane;
      const Vec<F> x = load(at);
      Mask<F> kept = x == x;
      if (!plain.has(j)) kept &= allowed(w, lane, j);
      const Vec<F> y = select(kept, x, hidden);
      store(at, y);
      most = max(most, y);
    }
    Vec<F> sum = load(w.sum + lane) * exp2((before - most) * log2e);
    for (int64_t j = first; j < tile_end; ++j)
      sum += exp2((load(w.windows + row(j, first) * kQueries + lane) - most) * log2e);
    store(w.maximum + lane, most);
    store(w.sum + lane, sum);
  }

  // The sum of the windows of block j, in their order: equal windows make equal blocks.
  HK_INLINE Vec<F> block_sum(const Work& w, int lane, int64_t j, int64_t tile, int64_t visible) const {
    const int64_t start = first_window(j) - halo_;
    int64_t end = first_window(j + 1);
    if (end > visible) end = visible;
    Vec<F> sum = zero<F>();
    for (int64_t x = start < 0 ? 0 : start; x < end; ++x)
      sum = fma(set1(w.weights[x - start]), load(w.windows + row(x, tile) * kQueries + lane), sum);
    const Vec<F> least = max(sum, zero<F>());  // NaN becomes 0
    return min(least, set1(static_cast<F>(sizeof(F) == 4 ? 3.4028234e38 : 1.7976931348623157e308)));
  }

  // Offers the blocks [first, tile_end) to the lists of a vector of queries.
  __attribute__((noinline)) void offer(Work& w, int lane, int64_t first, int64_t tile_end, bool scored) const {
    if (tile_end > w.end[last_lane(w, lane)]) tile_end = w.end[last_lane(w, lane)];
    // Inline, so that short lists are in registers.
    with_list<F>(w.list(lane, n_), [&](auto& list) __attribute__((always_inline)) {
      list.load_lists();
      offer_to(list, w, lane, first, tile_end, scored);
      list.store_lists();
    });
  }
  template <class List>
  HK_INLINE void offer_to(List& list, const Work& w, int lane, int64_t first, int64_t tile_end, bool scored) const {
    const int last = last_lane(w, lane);
    const Plain plain = plain_blocks(w, lane);
    const Vec<F> infinity = set1(static_cast<F>(__builtin_inff()));
    Vec<F> threshold = list.last();
    for (int64_t j = first; j < tile_end; ++j) {
      Vec<F> score;
      if (probability()) {
        score = scored ? block_sum(w, lane, j, first, w.visible[last]) : zero<F>();
        if (!plain.has(j)) {
          const Mask<F> block = set1_lanes<F>(j), own = load_lanes<F>(w.own + lane);
          const Mask<F> initial = set1_lanes<F>(j < p_.num_initial ? -1 : 0);
          const Mask<F> local = (block > own - set1_lanes<F>(p_.num_local)) & (block <= own);
          score = select(initial | local, infinity, score);
          score = select(allowed(w, lane, j), score, -infinity);
        }
      } else {
        score = load(w.windows + row(j, first) * kQueries + lane);
        if (!plain.has(j)) score = select(allowed(w, lane, j), score, -infinity);
      }
      if (any_greater(score, threshold)) {
        list.insert(select(score == score, score, -infinity), j);
        threshold = list.last();
      }
    }
  }

  void finish(Work& w, int64_t b, int64_t head, int64_t first, bool with_sums) const {
    int32_t* out = p_.indices + ((b * p_.heads + head) * p_.n_queries() + first) * n_;
    for (int lane = 0; lane < w.queries; lane += W) {
      const TopBlocks<F> list = w.list(lane, n_);
      if (with_sums) {
        constexpr double kLogLeast = -23.025850929940457;  // ln(1e-10)
        const Vec<F> total = fma(log2(load(w.sum + lane)), set1(static_cast<F>(kLn2)), load(w.maximum + lane));
        list.drop(total + set1(static_cast<F>(kLogLeast)));
      }
      list.sort();
      const int end = lane + W < w.queries ? lane + W : w.queries;
      for (int i = lane; i < end; ++i)
        for (int k = 0; k < n_; ++k) out[i * n_ + k] = static_cast<int32_t>(w.blocks[k * kQueries + i]);
    }
  }

  const SelectParams& p_;
  const Storage<F>& storage_;
  const Storage<F> k_storage_;
  int dim_, padded_, n_;
  int64_t halo_, tile_blocks_, rows_ = 0;
  ScratchLayout layout_;
  size_t q_at_, rows_at_, lse_at_, k_at_, windows_at_, scores_at_, blocks_at_, weights_at_, total_at_, ends_at_;
};

}  // namespace

void select_blocks(const SelectParams& p) {
#if defined(__AVX512BF16__)
  Select<Pair>(p, storage_of<float, BFloat16>()).run();
#else
  with_storage(p.q.dtype, [&]<class F>(const Storage<F>& storage) { Select<F>(p, storage).run(); });
#endif
}

}  // namespace HK_ISA
}  // namespace hierkernels

// Products of matrices. The right operand is copied to panels of 64 columns, word by word; six rows of the left one are
// read where they are, or copied if their terms do not adjoin in memory or are of another type.
//
// Six rows by 64 columns fill the registers: 24 sums, a word of the panel in four, and one for the row's. A panel of 768
// words streams from the second-level cache, six rows stay in the first.
#include <omp.h>

#include <vector>

#include "../scratch.h"
#include "product.h"
#include "words.h"

namespace hierkernels::HK_ISA {
namespace {

constexpr int kRows = 6, kVectors = 4, kPanel = kVectors * kWidth<float>;
constexpr int64_t kMostSixes = 16, kLeastSixes = 3, kPanelsPerRound = 32;
// From so many rows for each other thread on, every thread packs all panels for itself: what another core wrote comes
// slowly where cores do not share a cache (a quarter of the time of 256 rows, measured), packing twice takes 3 to 5%.
constexpr int64_t kRowsForOwnPanels = 128;
// Words of a pass over all rows, whose panels stay in a cache, and of a sum that is then added to the result: longer sums
// would have larger rounding errors.
constexpr int64_t kWordsPerPass = 768, kWordsPerSum = 256;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Lines of an operand, and words of them from a term on.
struct Part {
  int64_t line, lines, term, words;
};

// out[word][panel's columns], `width` columns of which those beyond the operand are zeros.
template <class T>
void pack_panel(const Operand& x, const Part& part, float* out) {
  constexpr int W = kWidth<float>;
  const int64_t width = ceil_div(part.lines, W) * W;
  for (int64_t w = 0; w < part.words; w += W)
    for (int64_t c = 0; c < width; c += W)
      copy_block<T, true>(x, part.line + c, part.term + w * Words::kTerms, part.words - w, out + w * width + c, width, nullptr);
}

// out[row][word], rows `stride` words apart. Adds to the sums of the operand's lines, unless they are null.
template <class T>
void pack_rows(const Operand& x, const Part& part, float* out, int64_t stride, float* sums) {
  constexpr int W = kWidth<float>;
  for (int64_t w = 0; w < part.words; w += W)
    for (int64_t r = 0; r < part.lines; r += W)
      copy_block<T, false>(x, part.line + r, part.term + w * Words::kTerms, part.lines - r, out + r * stride + w, stride,
                           sums ? sums + part.line + r : nullptr);
}

// Where sums go, and what is added to them, unless null: rows `addend_stride` apart, and a row for all of them.
template <class Out>
struct Target {
  Out* data;
  int64_t stride;
  const Out* addend;
  int64_t addend_stride;
  const float* bias;
};

// Up to six rows by the columns of a panel. Not inline: its loop then has all registers.
template <class Out, int V>
__attribute__((noinline)) void multiply(const float* a, int64_t a_stride, int rows, const float* panel, int64_t words,
                                        int columns, const Target<Out>& to) {
  constexpr int W = kWidth<float>;
  const float* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = a + (r < rows ? r : rows - 1) * a_stride;
    if (r < rows)
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(to.data + r * to.stride + v * W, 1);
        if (to.addend) __builtin_prefetch(to.addend + r * to.addend_stride + v * W);
      }
  }
  VecF sums[kRows][V];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero<float>();
  for (int64_t w = 0; w < words; ++w, panel += V * W) {
    VecF b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(panel + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecF x = _mm512_set1_ps(row[r][w]);  // a word, not to be computed with
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = Words::multiply_add(x, b[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    if (r < rows) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Out* at = to.data + r * to.stride + v * W;
        const int n = columns - v * W < W ? columns - v * W : W;
        if (to.addend) sums[r][v] += load_as<float>(to.addend + r * to.addend_stride + v * W, n);
        if (to.bias) sums[r][v] += load(to.bias + v * W, n);
        Words::store_sums(at, sums[r][v], n);
      }
    }
}

template <class Out>
void multiply_panel(const float* a, int64_t a_stride, int rows, const float* panel, int64_t words, int columns,
                    const Target<Out>& to) {
  switch ((columns + kWidth<float> - 1) / kWidth<float>) {
    case 1: return multiply<Out, 1>(a, a_stride, rows, panel, words, columns, to);
    case 2: return multiply<Out, 2>(a, a_stride, rows, panel, words, columns, to);
    case 3: return multiply<Out, 3>(a, a_stride, rows, panel, words, columns, to);
    default: return multiply<Out, 4>(a, a_stride, rows, panel, words, columns, to);
  }
}

Operand operand(const Tensor& x, int lines, int terms) {
  return {x.data, x.size[lines], x.size[terms], x.stride[lines], x.stride[terms]};
}

// An operand's type chooses how it is copied.
struct Packing {
  explicit Packing(DType type) {
    panel = pack_panel<float>;
    rows = pack_rows<float>;
    if constexpr (Words::kTerms == 2)
      if (type == DType::kBFloat16) {
        panel = pack_panel<BFloat16>;
        rows = pack_rows<BFloat16>;
      }
  }
  void (*panel)(const Operand&, const Part&, float*);
  void (*rows)(const Operand&, const Part&, float*, int64_t, float*);
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The rows of the left operand that a thread multiplies next: brought to its second-level cache, or copied, a little after
// each of the products before them.
class NextRows {
 public:
  // `copy`: where to, rows `stride` words apart; null if rows are read where they are.
  NextRows(const Operand& x, const Packing& packing, const Part& part, int64_t element_bytes, float* copy, int64_t stride,
           float* sums)
      : x_(x), packing_(packing), part_(part), bytes_(element_bytes), copy_(copy), stride_(stride), sums_(sums) {
    if (part_.lines > 0) ask(0);
  }

  // The share of the work that is due after `done` of `all` products.
  HK_INLINE void advance(int64_t done, int64_t all) {
    for (; at_ < part_.words && at_ * all < done * part_.words; at_ += kStep) {
      const Part step = {part_.line, part_.lines, part_.term + at_ * Words::kTerms, smaller(part_.words - at_, kStep)};
      if (copy_) packing_.rows(x_, step, copy_ + at_, stride_, sums_);
      if (at_ + kStep < part_.words) ask(at_ + kStep);
    }
  }

 private:
  static constexpr int64_t kStep = kWidth<float>;

  HK_INLINE void ask(int64_t word) const {
    const int64_t term = part_.term + word * Words::kTerms, terms = smaller(kStep * Words::kTerms, x_.terms - term);
    const char* data = static_cast<const char*>(x_.data) + (part_.line * x_.line_stride + term * x_.term_stride) * bytes_;
    const bool adjoin = x_.terms_adjoin();
    const int64_t rows = adjoin ? part_.lines : terms, length = (adjoin ? terms : part_.lines) * bytes_;
    const int64_t stride = (adjoin ? x_.line_stride : x_.term_stride) * bytes_;
    for (int64_t i = 0; i < rows; ++i) prefetch(data + i * stride, length + 63);
  }

  const Operand& x_;
  const Packing& packing_;
  const Part part_;
  const int64_t bytes_;
  float* const copy_;
  const int64_t stride_;
  float* const sums_;
  int64_t at_ = 0;
};

template <class Out>
class Product {
 public:
  explicit Product(const ProductParams& p)
      : p_(p), left_(operand(p.a, 0, 1)), right_(operand(p.b, 1, 0)), pack_left_(p.a.dtype), pack_right_(p.b.dtype) {
    const DType type = Words::kTerms == 2 ? DType::kBFloat16 : DType::kFloat32;
    in_place_ = left_.terms_adjoin() && p.a.dtype == type && left_.terms % Words::kTerms == 0 &&
                left_.line_stride % Words::kTerms == 0 && !p.row_sums;
    // Sums that are not kept in float32 are finished at once.
    words_ = ceil_div(left_.terms, Words::kTerms);
    const int64_t passes = kSame<Out, float> && words_ > kWordsPerPass ? ceil_div(words_, kWordsPerPass) : 1;
    pass_words_ = round_up(words_ > 0 ? ceil_div(words_, passes) : 1, kWidth<float>);
    // Not a power of two for copies: rows would share sets of the caches.
    stride_ = in_place_ ? left_.line_stride / Words::kTerms : pass_words_ + kWidth<float>;
    panels_ = ceil_div(right_.lines, kPanel);
    panel_group_ = smaller(panels_, kPanelsPerRound);
    rounds_ = passes * ceil_div(panels_, panel_group_);
    threads_ = omp_get_max_threads();
    own_panels_ = left_.lines >= kRowsForOwnPanels * (threads_ - 1);
    share_rows();
    copy_ = in_place_ ? 0 : first_row_[1] * stride_;
  }

  void run() {
    ScratchLayout layout;
    const int64_t n_sums = p_.row_sums ? rounds_ * left_.lines : 0;
    const size_t panels_at = layout.add(sizeof(float) * panel_group_ * kPanel * pass_words_ * (own_panels_ ? threads_ : 1));
    const size_t copies_at = layout.add(sizeof(float) * copy_ * 2 * threads_);
    const size_t sums_at = layout.add(sizeof(float) * n_sums);
    char* const scratch = thread_scratch(ScratchUse::kShared, layout.total());
    packed_ = reinterpret_cast<float*>(scratch + panels_at);
    copies_ = reinterpret_cast<float*>(scratch + copies_at);
    sums_ = reinterpret_cast<float*>(scratch + sums_at);
    memset(sums_, 0, sizeof(float) * n_sums);
#pragma omp parallel num_threads(threads_)
    run_thread();
    for (int64_t row = 0; p_.row_sums && row < left_.lines; ++row) {
      float sum = 0;
      for (int64_t round = 0; round < rounds_; ++round) sum += sums_[round * left_.lines + row];
      p_.row_sums.template as<float>()[row] = sum;
    }
  }

 private:
  // A round multiplies all rows by a group of panels, over the words of a pass.
  struct Round {
    int64_t word, words, panel, end;
  };
  Round round_of(int64_t number) const {
    const int64_t groups = ceil_div(panels_, panel_group_);
    const int64_t word = number / groups * pass_words_, panel = number % groups * panel_group_;
    return {word, smaller(pass_words_, words_ - word), panel, smaller(panels_, panel + panel_group_)};
  }
  int columns(int64_t panel) const { return static_cast<int>(smaller(right_.lines - panel * kPanel, kPanel)); }
  float* packed(const Round& round, int64_t panel) const {
    const int64_t owner = own_panels_ ? omp_get_thread_num() : 0;
    return packed_ + (owner * panel_group_ + panel - round.panel) * kPanel * pass_words_;
  }
  // The words [word, word + words) of a round's panel.
  void pack(const Round& round, int64_t panel, int64_t word, int64_t words) const {
    const Part part = {panel * kPanel, columns(panel), (round.word + word) * Words::kTerms, words};
    pack_right_.panel(right_, part, packed(round, panel) + word * round_up(columns(panel), kWidth<float>));
  }
  // All panels of a round, in the order in which the operand lies in memory.
  void pack_all(const Round& round) const {
    const int64_t step = right_.terms_adjoin() ? round.words : kWidth<float>;
    for (int64_t word = 0; word < round.words; word += step)
      for (int64_t panel = round.panel; panel < round.end; ++panel)
        pack(round, panel, word, smaller(round.words - word, step));
  }

  // Cuts the rows into tasks, of sixteen times six rows each, the last ones smaller: then no thread waits long at the end.
  void share_rows() {
    int64_t row = 0;
    first_row_.push_back(0);
    while (row < left_.lines) {
      const int64_t share = ceil_div(ceil_div(left_.lines - row, kRows), 2 * threads_);
      const int64_t sixes = share < kLeastSixes ? kLeastSixes : smaller(share, kMostSixes);
      first_row_.push_back(row = smaller(left_.lines, row + sixes * kRows));
    }
    tasks_ = static_cast<int64_t>(first_row_.size()) - 1;
    rounds_done_.assign(tasks_, 0);
  }

  // Threads take the tasks of all rounds in order, each before it computes the one that it took before, so that it can
  // prepare the rows meanwhile. A thread that comes to another round packs its panels, and waits for nobody.
  void run_thread() {
    const int64_t thread = omp_get_thread_num();
    float* copies[2] = {copies_ + 2 * thread * copy_, copies_ + (2 * thread + 1) * copy_};
    int64_t number = take();
    int turn = 0;
    next_rows(number, copies[0]).advance(1, 1);
    for (int64_t r = 0; r < rounds_; ++r) {
      const Round round = round_of(r);
      const int64_t end = (r + 1) * tasks_;
      if (!own_panels_) {
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t panel = round.panel; panel < round.end; ++panel) pack(round, panel, 0, round.words);
      } else if (number < end) {
        pack_all(round);
      }
      for (int64_t next; number < end; number = next, turn ^= 1) {
        next = take();
        const int64_t task = number % tasks_;
        NextRows rows = next_rows(next, copies[turn ^ 1]);
        while (__atomic_load_n(&rounds_done_[task], __ATOMIC_ACQUIRE) < r) _mm_pause();
        multiply_rows(round, first_row_[task], first_row_[task + 1], copies[turn], rows);
        __atomic_store_n(&rounds_done_[task], r + 1, __ATOMIC_RELEASE);
      }
    }
  }
  int64_t take() { return __atomic_fetch_add(&taken_, 1, __ATOMIC_RELAXED); }

  // The rows of a task, to be prepared: nothing behind the last.
  NextRows next_rows(int64_t number, float* copy) const {
    const int64_t r = number / tasks_, task = number % tasks_;
    const Round round = round_of(r);
    Part part{};
    if (r < rounds_) part = {first_row_[task], first_row_[task + 1] - first_row_[task], round.word * Words::kTerms, round.words};
    return {left_, pack_left_, part, p_.a.element_bytes(), in_place_ ? nullptr : copy, stride_,
            p_.row_sums && round.panel == 0 ? sums_ + r * left_.lines : nullptr};
  }

  // Up to six rows by a panel. Sums that are not kept in float32 are finished at once.
  HK_INLINE void multiply_six(const Round& round, int64_t panel, int64_t row, int64_t rows, const float* a) const {
    const Tensor &out = p_.out, &addend = p_.addend;
    const int64_t column = panel * kPanel, width = round_up(columns(panel), kWidth<float>);
    Out* const to = out.as<Out>() + row * out.stride[0] + column;
    Target<Out> target = {to, out.stride[0], nullptr, 0, nullptr};
    if (round.word == 0 && p_.bias) target.bias = p_.bias.template as<float>() + column;
    if (round.word == 0 && addend) {
      target.addend = addend.as<Out>() + row * addend.stride[0] + column;
      target.addend_stride = addend.stride[0];
    }
    const auto add_to_sums = [&] { target = {to, out.stride[0], to, out.stride[0], nullptr}; };
    if (round.word > 0) add_to_sums();
    const float* b = packed(round, panel);
    for (int64_t rest = round.words;;) {
      const int64_t words = kSame<Out, float> ? smaller(rest, kWordsPerSum) : rest;
      multiply_panel<Out>(a, stride_, static_cast<int>(rows), b, words, columns(panel), target);
      if ((rest -= words) == 0) return;
      a += words;
      b += words * width;
      add_to_sums();
    }
  }

  void multiply_rows(const Round& round, int64_t begin, int64_t end, const float* copy, NextRows& later) {
    const float* a = in_place_ ? static_cast<const float*>(left_.data) + begin * stride_ + round.word : copy;
    const int64_t all = ceil_div(end - begin, kRows) * (round.end - round.panel);
    int64_t done = 0;
    for (int64_t panel = round.panel; panel < round.end; ++panel)
      for (int64_t row = begin; row < end; row += kRows) {
        multiply_six(round, panel, row, smaller(end - row, kRows), a + (row - begin) * stride_);
        later.advance(++done, all);
      }
    later.advance(1, 1);
  }

  const ProductParams& p_;
  const Operand left_, right_;
  const Packing pack_left_, pack_right_;
  bool in_place_, own_panels_;
  int64_t words_, pass_words_, stride_, panels_, panel_group_, rounds_;
  int64_t threads_, tasks_, copy_;
  float *packed_, *copies_, *sums_;
  std::vector<int64_t> first_row_, rounds_done_;  // of a task; the last row's end follows
  int64_t taken_ = 0;                             // tasks, counted through all rounds
};

}  // namespace

void product(const ProductParams& p) {
  if constexpr (Words::kTerms == 2)
    if (p.out.dtype == DType::kBFloat16) return Product<BFloat16>(p).run();
  Product<float>(p).run();
}

}  // namespace hierkernels::HK_ISA

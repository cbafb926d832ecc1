// The choice of blocks: scores tile by tile, reduced to the best n of each query in shared memory.
//
// Scores of 32 blocks are sums over the windows that share tokens with them and over the heads that choose together. Then a
// lane has one block of a query, and the warp merges these into the query's list.
#include "../attention/scores.h"
#include "../common/launch.h"
#include "../operators.h"
#include "args.h"
#include "ranking.h"

namespace hierkernels::cuda {
namespace {

constexpr float kLargest = 3.402823466e38f;
constexpr float kNoBlockLogit = -1000.f, kLeastProbability = 1e-10f;  // hierkernels/ops/select_blocks/call.py

template <class T>
struct Selection {
  const SelectArgs& p;
  const SelectMemory m;
  unsigned char* const memory;
  const int chooser, b, query0, last;  // last: the last query that there is

  __device__ __forceinline__ explicit Selection(const SelectArgs& args)
      : p(args),
        m(select_memory<T>(args)),
        memory(shared_memory()),
        chooser(static_cast<int>(blockIdx.x) / args.tiles % args.choosers),
        b(static_cast<int>(blockIdx.x) / args.tiles / args.choosers),
        // The last queries of a causal call have the most blocks: they start first.
        query0((args.tiles - 1 - static_cast<int>(blockIdx.x) % args.tiles) * args.queries),
        last(query0 + args.queries < args.n_queries ? query0 + args.queries - 1 : args.n_queries - 1) {}

  template <class X>
  __device__ __forceinline__ X* at(int offset) const {
    return reinterpret_cast<X*>(memory + offset);
  }
  __device__ __forceinline__ uint64_t* list(int q) const { return at<uint64_t>(m.lists) + q * p.listed; }

  // Starts copying `count` rows of q or k.
  template <class Row>
  __device__ __forceinline__ void copy_tile(int offset, const Rows& from, int count, Row row) const {
    constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
    const int chunks = p.width / kChunk;
    for (int i = threadIdx.x; i < count * chunks; i += kSelectThreads) {
      const int r = i / chunks, column = (i - r * chunks) * kChunk;
      copy_chunk<T>(memory + offset + r * m.row_bytes + column * static_cast<int>(sizeof(T)), from, row(r), column);
    }
  }
  __device__ __forceinline__ void copy_windows(int w0, int stage) const {
    const T* const first = p.k.at<const T>(b, chooser * p.pack / p.group, 0);
    copy_tile(m.k + stage * p.windows * m.row_bytes, p.k, p.windows,
              [&](int r) { return w0 + r < p.n_windows ? first + (w0 + r) * p.k.token : nullptr; });
  }
  // The rows of a part of the heads, and what they need to know.
  __device__ __forceinline__ void copy_queries(int part) const {
    const auto head_of = [&](int r) { return part * p.heads + r % p.heads; };
    const auto is_real = [&](int r) { return r / p.heads < p.queries && query0 + r / p.heads <= last && head_of(r) < p.pack; };
    copy_tile(m.q, p.q, p.rows, [&](int r) {
      return is_real(r) ? p.q.at<const T>(b, chooser * p.pack + head_of(r), query0 + r / p.heads) : nullptr;
    });
    for (int r = threadIdx.x; r < p.rows; r += kSelectThreads) {
      float level = infinity();  // of a row that sees no window: all probabilities are 0
      int seen = 0;
      if (is_real(r)) {
        const int query = query0 + r / p.heads;
        seen = static_cast<int>(p.visible.at(query, p.n_windows));
        if (p.lse) {
          const int64_t row = (static_cast<int64_t>(b) * p.choosers + chooser) * p.pack + head_of(r);
          const float lse = p.lse[row * p.n_queries + query];
          if (lse != -infinity()) level = lse;
        }
      }
      at<float>(m.levels)[r] = level;
      at<int>(m.seen)[r] = seen;
    }
  }

  // What each row gives to the windows of a tile: probabilities, or logits.
  __device__ __forceinline__ void score_windows(int w0, int stage) const {
    const int warp = threadIdx.x / kWarp, row_warps = p.rows / 16, row0 = warp % row_warps * 16;
    const int lane = threadIdx.x % kWarp, steps = p.width * static_cast<int>(sizeof(T)) / kStepBytes;
    const unsigned char* const q_tile = memory + m.q + (row0 + lane % 16) * m.row_bytes + lane / 16 * 16;
    const unsigned char* const k_tile = memory + m.k + stage * p.windows * m.row_bytes +
                                        (lane / 16 * 8 + lane % 8) * m.row_bytes + lane / 8 % 2 * 16;
    for (int piece = warp / row_warps * 16; piece < p.windows; piece += kSelectThreads / kWarp / row_warps * 16) {
      Sums<1, 2> s;
      clear(s);
      with_type<T>(p.q.dtype, [&](auto type) {
        using X = decltype(type);
#pragma unroll(sizeof(T) == 4 ? 1 : 4)
        for (int step = 0; step < steps; ++step) {
          Words<X, 4> left, right;
          load_words(left, q_tile + step * kStepBytes);
          load_words(right, k_tile + piece * m.row_bytes + step * kStepBytes);
          multiply<X>(s.x[0][0], left, right, 0);
          multiply<X>(s.x[0][1], left, right, 1);
        }
      });
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int row = row0 + sums_row(0, 2 * x), seen = at<int>(m.seen)[row];
        const float level = at<float>(m.levels)[row];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = piece + sums_column(n, e);
            float value = s.x[0][n][2 * x + e] * p.scale;
            if (p.lse) value = expf(value - level);  // with subnormal results: they rank blocks, too
            at<float>(m.probabilities)[row * m.score_stride + column] = w0 + column < seen ? value : 0.f;
          }
      }
    }
  }

  // Adds the heads of each query.
  __device__ __forceinline__ void add_heads() const {
    for (int i = threadIdx.x; i < p.queries * p.windows; i += kSelectThreads) {
      const int q = i / p.windows, w = i - q * p.windows;
      const float* const rows = at<float>(m.probabilities) + q * p.heads * m.score_stride + w;
      float sum = 0.f;
      for (int h = 0; h < p.heads; ++h) sum += rows[h * m.score_stride];
      at<float>(m.sums)[q * m.score_stride + w] = sum;
    }
  }

  // Adds a tile of windows to the blocks from block0 on, once for each chunk in common.
  __device__ __forceinline__ void add_windows(int block0, int w0) const {
    const float* const sums = at<float>(p.heads > 1 ? m.sums : m.probabilities);
    for (int i = threadIdx.x; i < p.queries * kTileBlocks; i += kSelectThreads) {
      const int q = i / kTileBlocks, first = (block0 + i % kTileBlocks) * p.per_block - p.first_chunk;  // its first chunk
      int w = first - p.per_window + 1, end = first + p.per_block;
      if (w < w0) w = w0;
      if (end > w0 + p.windows) end = w0 + p.windows;
      float sum = at<float>(m.scores)[i];
      for (; w < end; ++w) {
        const int from = w > first ? w : first, past = first + p.per_block;
        const int to = w + p.per_window < past ? w + p.per_window : past;
        sum += static_cast<float>(to - from) * sums[q * m.score_stride + w - w0];
      }
      at<float>(m.scores)[i] = sum;
    }
  }

  // Each warp merges the scores of the blocks from block0 on into the lists of its queries, and makes them 0.
  __device__ __forceinline__ void rank(int block0) const {
    const int lane = threadIdx.x % kWarp, block = block0 + lane;
    for (int q = threadIdx.x / kWarp; q < p.queries; q += kSelectThreads / kWarp) {
      float score = at<float>(m.scores)[q * kTileBlocks + lane];
      at<float>(m.scores)[q * kTileBlocks + lane] = 0.f;
      const int query = query0 + q, own = (query + p.query_offset) / p.block_size;
      if (query > last) continue;
      bool allowed = block < p.candidates.at(query, p.blocks) && !(p.exclude_own && block == own);
      if (p.lse) {
        score = score == score ? fminf(score, kLargest) : 0.f;  // NaN counts as the least
        if (block < p.initial || (block > own - p.local && block <= own)) score = infinity();
      } else {
        allowed = allowed && score == score && score != -infinity();
        add_to_softmax(at<float>(m.softmax) + 2 * q, allowed ? score : -infinity());
      }
      merge(list(q), p.listed, allowed ? entry_of(score, block) : 0);
      __syncwarp();
    }
  }

  // The largest logit and the sum of exponentials relative to it, of what 32 lanes bring too.
  __device__ __forceinline__ void add_to_softmax(float* state, float score) const {
    const float before = state[0], total = state[1];
    float top = fmaxf(before, score);
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
    float sum = natural_exp(score - top);
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
      state[0] = top;
      state[1] = total * natural_exp(before - top) + sum;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void start() const {
    for (int i = threadIdx.x; i < p.queries * p.listed; i += kSelectThreads) at<uint64_t>(m.lists)[i] = 0;
    for (int i = threadIdx.x; i < p.queries * kTileBlocks; i += kSelectThreads) at<float>(m.scores)[i] = 0.f;
    for (int i = threadIdx.x; i < p.queries; i += kSelectThreads) {
      at<float>(m.softmax)[2 * i] = kNoBlockLogit;
      at<float>(m.softmax)[2 * i + 1] = 1.f;
    }
  }

  __device__ __forceinline__ void store() const {
    for (int q = threadIdx.x / kWarp; q < p.queries && query0 + q <= last; q += kSelectThreads / kWarp) {
      const float top = at<float>(m.softmax)[2 * q], total = at<float>(m.softmax)[2 * q + 1];
      const int64_t row = (static_cast<int64_t>(b) * p.choosers + chooser) * p.n_queries + query0 + q;
      store_ascending(p.indices + row * p.selected, p.selected, list(q), p.listed, [&](uint64_t entry) {
        return p.lse || natural_exp(score_of(entry) - top) / total > kLeastProbability;
      });
    }
  }
};

// A step of the loop: a tile of windows, for a tile of blocks and a part of the heads.
struct Step {
  int block0, part, w0, end;  // end: of the windows of the blocks
};

// The first windows of a tile of blocks, up to those that the last query sees.
__device__ __forceinline__ Step first_step(const SelectArgs& p, int block0, int part, int seen) {
  const int first = block0 * p.per_block - p.first_chunk - p.per_window + 1;
  const int end = (block0 + kTileBlocks) * p.per_block - p.first_chunk;
  return {block0, part, first < 0 ? 0 : first, end < seen ? end : seen};
}
__device__ __forceinline__ Step next_step(const SelectArgs& p, Step s, int seen) {
  s.w0 += p.windows;
  if (s.w0 < s.end) return s;
  if (s.part + 1 < p.parts) return first_step(p, s.block0, s.part + 1, seen);
  return first_step(p, s.block0 + kTileBlocks, 0, seen);
}

template <class T>
__device__ __forceinline__ void compute(const SelectArgs& p) {
  const Selection<T> s(p);
  const int blocks = static_cast<int>(p.candidates.at(s.last, p.blocks));
  const int seen = static_cast<int>(p.visible.at(s.last, p.n_windows));
  s.start();
  if (blocks > 0) {
    s.copy_queries(0);
    s.copy_windows(first_step(p, 0, 0, seen).w0, 0);
  }
  ptx::cp_async_commit();

  // A tile of blocks is ranked even if no window of it is seen.
  int stage = 0;
  Step next{};
  for (Step step = first_step(p, 0, 0, seen); step.block0 < blocks; step = next, stage ^= 1) {
    next = next_step(p, step, seen);
    if (next.block0 < blocks) s.copy_windows(next.w0, stage ^ 1);
    ptx::cp_async_commit();  // perhaps empty: waiting for all but one means this tile in any case
    if (p.parts > 1)
      ptx::cp_async_wait<0>();  // the queries may have been copied with the next windows
    else
      ptx::cp_async_wait<1>();
    __syncthreads();  // every thread's part of the tile is there, and the scores before are used
    s.score_windows(step.w0, stage);
    __syncthreads();
    if (p.heads > 1) {
      s.add_heads();
      __syncthreads();
    }
    if (step.w0 < step.end) s.add_windows(step.block0, step.w0);
    if (next.part != step.part && next.block0 < blocks) s.copy_queries(next.part);
    if (next.block0 == step.block0) continue;
    __syncthreads();
    s.rank(step.block0);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  s.store();
}

__global__ void __launch_bounds__(kSelectThreads, 2) select_blocks_kernel(const __grid_constant__ SelectArgs p) {
  with_width(p.q.dtype, [&](auto type) { compute<decltype(type)>(p); });
}

template <class T>
void run(SelectArgs p, void* stream) {
  const int bytes = p.width * static_cast<int>(sizeof(T));
  p.rows = bytes <= 256 ? 64 : 32;
  p.windows = bytes <= 256 ? 64 : bytes == 512 ? 32 : 16;
  const int needed = kTileBlocks * p.per_block + p.per_window - 1;
  while (p.windows > 16 && p.windows / 2 >= needed) p.windows /= 2;
  p.heads = p.pack < p.rows ? p.pack : p.rows;
  p.parts = (p.pack + p.heads - 1) / p.heads;
  p.queries = p.rows / p.heads;
  if (p.queries > p.n_queries) p.queries = p.n_queries;
  while (p.queries > 1 && select_memory<T>(p).bytes > kMaxSharedBytes) --p.queries;
  p.tiles = (p.n_queries + p.queries - 1) / p.queries;
  launch("select_blocks", select_blocks_kernel, static_cast<int64_t>(p.batch) * p.choosers * p.tiles, kSelectThreads,
         select_memory<T>(p).bytes, stream, p);
}

SelectArgs make_args(const SelectParams& p, const Tensor& indices) {
  SelectArgs a{};
  a.q = Rows::of(p.q);
  a.k = Rows::of(p.k);
  a.lse = p.lse.as<float>();
  a.indices = indices.as<int>();
  a.visible = p.visible;
  a.candidates = p.candidates;
  a.batch = static_cast<int>(p.q.size[0]);
  a.choosers = static_cast<int>(p.heads);
  a.pack = static_cast<int>(p.merged);
  a.group = static_cast<int>(p.q.size[1] / p.k.size[1]);
  a.n_queries = static_cast<int>(p.n_queries());
  a.n_windows = static_cast<int>(p.n_windows());
  a.blocks = static_cast<int>(p.num_blocks);
  a.per_block = static_cast<int>(p.windows_per_block);
  a.per_window = static_cast<int>(p.chunks_per_window);
  a.first_chunk = static_cast<int>(p.first_chunk);
  a.block_size = static_cast<int>(p.block_size);
  a.query_offset = static_cast<int>(p.query_offset);
  a.selected = static_cast<int>(p.num_selected);
  a.listed = a.selected < a.blocks ? a.selected : a.blocks;
  a.initial = static_cast<int>(p.num_initial);
  a.local = static_cast<int>(p.num_local);
  a.exclude_own = p.exclude_own_block;
  a.scale = static_cast<float>(p.scale);
  a.width = a.q.channels <= 64 ? 64 : a.q.channels <= 128 ? 128 : 256;
  return a;
}

}  // namespace

void select_blocks(const SelectParams& p, const Tensor& indices, void* stream) {
  const SelectArgs a = make_args(p, indices);
  if (p.q.dtype == DType::kFloat32) return run<float>(a, stream);
  run<Number16>(a, stream);
}

std::vector<KernelInfo> select_kernels() {
  return {{"select_blocks_kernel", kSelectThreads, kMaxSharedBytes}};
}

}  // namespace hierkernels::cuda

// Kernels that prove the emulation: single instructions, right kernels, and kernels with planted faults.
#include "probes.h"

#include "../../../csrc/cuda/common/launch.h"
#include "../../../csrc/cuda/common/ptx.h"

namespace hierkernels::cuda {
namespace {

// ---- single instructions: the words of the fragments, as the PTX ISA numbers them ----

struct WordsParams {
  const uint32_t *a, *b;
  const float* c;
  uint32_t* out;
};

template <bool kTransposed>
__global__ void ldmatrix_kernel(const __grid_constant__ WordsParams p) {
  uint32_t* matrices = reinterpret_cast<uint32_t*>(shared_memory());  // 32 rows of 4 words
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) matrices[lane * 4 + i] = p.a[lane * 4 + i];
  __syncwarp();
  uint32_t r[4];
  if (kTransposed)
    ptx::ldmatrix_x4_trans(r, matrices + lane * 4);
  else
    ptx::ldmatrix_x4(r, matrices + lane * 4);
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = r[i];
}

template <class T>
__device__ void mma_of(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 4)
    ptx::mma_tf32(d, a, b0, b1);
  else
    ptx::mma(T(), d, a, b0, b1);
}

template <class T>
__global__ void mma_kernel(const __grid_constant__ WordsParams p) {
  const int lane = threadIdx.x;
  float d[4];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    d[i] = p.c[lane * 4 + i];
    a[i] = p.a[lane * 4 + i];
  }
  mma_of<T>(d, a, p.b[lane * 2], p.b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = __float_as_uint(d[i]);
}

// Words 0 to 6: shuffles and votes of lane l; the tests have the formulas.
__global__ void warp_kernel(const __grid_constant__ WordsParams p) {
  const int l = threadIdx.x % kWarp;
  uint32_t sum = l * l;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  uint32_t* out = p.out + threadIdx.x * 7;
  out[0] = sum;
  out[1] = __shfl_up_sync(kAllLanes, l, 3, 16);
  out[2] = __shfl_down_sync(kAllLanes, l, 5, 8);
  out[3] = __shfl_sync(kAllLanes, l, 7, 16);
  out[4] = __ballot_sync(kAllLanes, l % 3 == 0);
  // The halves of a warp go different ways.
  out[5] = l < 16 ? __ballot_sync(0x0000ffffu, l % 2) : __ballot_sync(0xffff0000u, l % 5 == 0);
  out[6] = __any_sync(kAllLanes, l == 9) + 2 * __all_sync(kAllLanes, l < 31);
}

// Words: bfloat16 pair, float16 pair, tf32, exp2 of each number; then the 16-bit numbers read back.
__global__ void convert_kernel(const __grid_constant__ WordsParams p) {
  const float x = p.c[threadIdx.x];
  uint32_t* out = p.out + threadIdx.x * 6;
  const uint32_t bf16 = ptx::pack<BFloat16>(x, -x), f16 = ptx::pack<Float16>(x, -x);
  out[0] = bf16;
  out[1] = f16;
  out[2] = ptx::to_tf32(x);
  out[3] = __float_as_uint(ptx::exp2(x));
  out[4] = __float_as_uint(ptx::to_float(BFloat16{static_cast<uint16_t>(bf16)}));
  out[5] = __float_as_uint(ptx::to_float(Float16{static_cast<uint16_t>(f16)}));
}

// ---- a 64 x 64 tile transposed through shared memory ----

template <Fault kFault>
__global__ void transpose_kernel(const __grid_constant__ TileParams p) {
  constexpr int kSize = 64, kStride = kSize + 1;
  float* tile = reinterpret_cast<float*>(shared_memory());
  for (int i = threadIdx.x; i < kSize * kSize; i += blockDim.x) {
    if (kFault == Fault::kUnwritten && i / kSize == 5) continue;
    tile[i / kSize * kStride + i % kSize] = p.in[i];
  }
  if (kFault != Fault::kNoBarrier) __syncthreads();
  for (int i = threadIdx.x; i < kSize * kSize; i += blockDim.x) {
    const int last = kFault == Fault::kOutOfBounds ? kSize + 2 : 0;
    p.out[i] = tile[i % kSize * kStride + i / kSize + (i == kSize * kSize - 1 ? last : 0)];
  }
}

// ---- the sum of `tiles` tiles of 1024 numbers, copied ahead into two stages by cp.async ----

template <Fault kFault>
__global__ void pipeline_kernel(const __grid_constant__ TileParams p) {
  constexpr int kTile = 1024, kThreads = 128, kEach = kTile / kThreads;
  float* stages = reinterpret_cast<float*>(shared_memory());
  const auto copy = [&](int tile) {
    for (int i = threadIdx.x * 4; i < kTile; i += kThreads * 4)
      ptx::cp_async16(stages + tile % 2 * kTile + i, p.in + static_cast<int64_t>(tile) * kTile + i, 16);
  };
  copy(0);
  ptx::cp_async_commit();
  float sum[kEach] = {};
  for (int tile = 0; tile < p.tiles; ++tile) {
    if (tile + 1 < p.tiles) copy(tile + 1);
    ptx::cp_async_commit();  // perhaps empty: then waiting for all but one still means this tile
    ptx::cp_async_wait<kFault == Fault::kNoWait ? 2 : 1>();
    if (kFault != Fault::kNoBarrier) __syncthreads();  // the copies of all threads can be seen
    // Read another thread's copies, or barriers would not matter.
    for (int i = 0; i < kEach; ++i) sum[i] += stages[tile % 2 * kTile + (kThreads - 1 - threadIdx.x) * kEach + i];
    if (kFault != Fault::kNoSecondBarrier) __syncthreads();  // all have read it: the stage may be written
  }
  ptx::cp_async_wait<0>();
  for (int i = 0; i < kEach; ++i) p.out[(kThreads - 1 - threadIdx.x) * kEach + i] = sum[i];
}

// ---- misuse that must be reported ----

__global__ void misuse_kernel(const __grid_constant__ MisuseParams p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x;
  switch (p.misuse) {
    case Misuse::kBarrierNotReached:
      if (thread < 32) __syncthreads();
      break;
    case Misuse::kLaneMissing:
      if (thread % kWarp) __shfl_sync(kAllLanes, 1, 0);
      break;
    case Misuse::kDivergence:
      if (thread % kWarp < 16)
        __shfl_sync(kAllLanes, 1, 0);
      else
        __ballot_sync(kAllLanes, true);
      break;
    case Misuse::kCopyNotAwaited:
      ptx::cp_async16(shared + thread * 4, p.data, 16);
      ptx::cp_async_commit();
      break;
    case Misuse::kUnalignedCopy:
      ptx::cp_async16(shared + thread * 4, p.data + 1, 16);
      ptx::cp_async_wait<0>();
      break;
    case Misuse::kGlobalOutOfBounds:
      p.data[thread + 4] = 0.f;
      break;
    case Misuse::kUnorderedWithinWarp:
      shared[thread] = 1.f;
      p.data[thread % 4] = shared[thread ^ 1];
      break;
  }
}

template <class Params>
void run(const char* name, void (*kernel)(Params), int threads, int shared_bytes, const Params& p) {
  launch(name, kernel, 1, threads, shared_bytes, nullptr, p);
}

}  // namespace

void probe_words(const std::string& name, const uint32_t* a, const uint32_t* b, const float* c, uint32_t* out) {
  const WordsParams p{a, b, c, out};
  if (name == "ldmatrix") run("ldmatrix", ldmatrix_kernel<false>, kWarp, 512, p);
  else if (name == "ldmatrix_trans") run("ldmatrix_trans", ldmatrix_kernel<true>, kWarp, 512, p);
  else if (name == "mma_bfloat16") run("mma", mma_kernel<BFloat16>, kWarp, 0, p);
  else if (name == "mma_float16") run("mma", mma_kernel<Float16>, kWarp, 0, p);
  else if (name == "mma_float32") run("mma", mma_kernel<float>, kWarp, 0, p);
  else if (name == "warp") run("warp", warp_kernel, 2 * kWarp, 0, p);
  else if (name == "convert") run("convert", convert_kernel, 2 * kWarp, 0, p);
  else throw std::runtime_error("no probe " + name);
}

void probe_transpose(Fault fault, const TileParams& p) {
  constexpr int kShared = 64 * 65 * 4;
  switch (fault) {
    case Fault::kNone: return run("transpose", transpose_kernel<Fault::kNone>, 128, kShared, p);
    case Fault::kNoBarrier: return run("transpose", transpose_kernel<Fault::kNoBarrier>, 128, kShared, p);
    case Fault::kUnwritten: return run("transpose", transpose_kernel<Fault::kUnwritten>, 128, kShared, p);
    case Fault::kOutOfBounds: return run("transpose", transpose_kernel<Fault::kOutOfBounds>, 128, kShared, p);
    default: throw std::runtime_error("transpose has no such fault");
  }
}

void probe_pipeline(Fault fault, const TileParams& p) {
  constexpr int kShared = 2 * 1024 * 4;
  switch (fault) {
    case Fault::kNone: return run("pipeline", pipeline_kernel<Fault::kNone>, 128, kShared, p);
    case Fault::kNoBarrier: return run("pipeline", pipeline_kernel<Fault::kNoBarrier>, 128, kShared, p);
    case Fault::kNoSecondBarrier: return run("pipeline", pipeline_kernel<Fault::kNoSecondBarrier>, 128, kShared, p);
    case Fault::kNoWait: return run("pipeline", pipeline_kernel<Fault::kNoWait>, 128, kShared, p);
    default: throw std::runtime_error("pipeline has no such fault");
  }
}

void probe_misuse(const MisuseParams& p) { run("misuse", misuse_kernel, 64, 1024, p); }

}  // namespace hierkernels::cuda

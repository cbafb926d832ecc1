// Kernels that prove the emulation of sm_90a: tensor copies, products of warpgroups, and a pipeline of both with
// planted faults.
#include "../../../csrc/cuda/common/launch.h"
#include "../../../csrc/cuda/hopper/tensor_map.h"
#include "probes.h"

namespace hierkernels::cuda {
namespace {

constexpr int kSize = 64, kTileBytes = kSize * kSwizzleBytes;

// A (rows, 64) matrix whose tiles are 64 rows.
TensorMap matrix_map(const void* data, int rows, bool is_float16) {
  TensorMap map;
  if (!make_tensor_map(map, data, is_float16, 2, {kSize, rows, 1, 1}, {1, kSize, 0, 0}, {kSize, kSize, 1, 1}))
    throw std::runtime_error("no tensor map");
  return map;
}

struct CopyParams {
  TensorMap map;
  int rank, bytes, at[4];
  uint32_t* out;
};

__global__ void tensor_copy_kernel(const __grid_constant__ CopyParams p) {
  unsigned char* const tile = shared_memory();
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(tile + p.bytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, p.bytes);
    if (p.rank == 2) ptx::tensor_copy(tile, &p.map, barrier, p.at[0], p.at[1]);
    if (p.rank == 3) ptx::tensor_copy(tile, &p.map, barrier, p.at[0], p.at[1], p.at[2]);
    if (p.rank == 4) ptx::tensor_copy(tile, &p.map, barrier, p.at[0], p.at[1], p.at[2], p.at[3]);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < p.bytes / 4; i += blockDim.x) p.out[i] = reinterpret_cast<uint32_t*>(tile)[i];
}

struct ProductParams {
  TensorMap a, b;
  const float* c;
  float* out;
};

// b has kN rows of 64 columns, or, transposed, 64 rows of kN columns, in panels of 64.
template <class T, int kN, bool kTransposed, bool kRegisters>
__global__ void product_kernel(const __grid_constant__ ProductParams p) {
  unsigned char* const a_tile = shared_memory();
  unsigned char* const b_tile = a_tile + kTileBytes;
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(b_tile + kN / kSize * kTileBytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, (1 + kN / kSize) * kTileBytes);
    ptx::tensor_copy(a_tile, &p.a, barrier, 0, 0);
    for (int i = 0; i < kN / kSize; ++i)
      ptx::tensor_copy(b_tile + i * kTileBytes, &p.b, barrier, kTransposed ? i * kSize : 0, kTransposed ? 0 : i * kSize);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto index = [&](int i) {
    return (16 * warp + lane / 4 + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2;
  };
  float d[kN / 2];
  uint32_t words[4][4];
  for (int i = 0; i < kN / 2; ++i) d[i] = p.c[index(i)];
  for (int step = 0; step < 4; ++step) {  // the swizzle by hand: 16 bytes `chunk` of a row are at chunk ^ row % 8
    const int row = 16 * warp + lane % 16, chunk = 2 * step + lane / 16;
    ptx::ldmatrix_x4(words[step], a_tile + row * kSwizzleBytes + (chunk ^ row % 8) * 16);
  }
  ptx::settle(d);
  ptx::settle(words);
  ptx::wgmma_fence();
  const uint32_t a = ptx::shared_address(a_tile), b = ptx::shared_address(b_tile);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t right = kTransposed ? ptx::matrix_descriptor(b + step * 16 * kSwizzleBytes, kTileBytes, kPatternBytes)
                                       : ptx::matrix_descriptor(b + step * 32, 16, kPatternBytes);
    if constexpr (kRegisters)
      ptx::wgmma<kTransposed>(T(), d, words[step], right, true);
    else
      ptx::wgmma<kTransposed>(T(), d, ptx::matrix_descriptor(a + step * 32, 16, kPatternBytes), right, true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(d);
  for (int i = 0; i < kN / 2; ++i) p.out[index(i)] = d[i];
}

struct PipelineParams {
  TensorMap b;
  const uint32_t* a;
  float* out;
  int tiles;
};

template <HopperFault kFault>
__device__ void produce(const PipelineParams& p, unsigned char* stages, uint64_t* full, uint64_t* empty) {
  constexpr int kAnnounced = kFault == HopperFault::kFewBytes    ? kTileBytes - 16
                             : kFault == HopperFault::kManyBytes ? kTileBytes + 16
                                                                 : kTileBytes;
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int stage = tile % 2;
    if (kFault != HopperFault::kNoEmptyWait) ptx::mbarrier_wait(empty + stage, (tile / 2 + 1) % 2);  // at once at first
    ptx::mbarrier_arrive_expect_tx(full + stage, kAnnounced);
    ptx::tensor_copy(stages + stage * kTileBytes, &p.b, full + stage, 0, tile * kSize);
  }
}

template <HopperFault kFault>
__global__ void tensor_pipeline_kernel(const __grid_constant__ PipelineParams p) {
  unsigned char* const a_tile = shared_memory();
  unsigned char* const stages = a_tile + kTileBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + 2 * kTileBytes);
  uint64_t* const empty = full + 2;
  for (int i = threadIdx.x; i < kSize * kSwizzleBytes / 4; i += blockDim.x) {  // A by ordinary stores
    const int row = i / 32, chunk = i % 32 / 4;
    reinterpret_cast<uint32_t*>(a_tile)[row * 32 + (chunk ^ row % 8) * 4 + i % 4] = p.a[i];
  }
  if (kFault != HopperFault::kNoProxyFence) ptx::fence_proxy_async();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, kWarpgroup / kWarp);
    }
    if (kFault != HopperFault::kNoInitFence) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x == kWarpgroup) produce<kFault>(p, stages, full, empty);
    return;
  }
  float d[kSize / 2];
  for (int i = 0; i < kSize / 2; ++i) d[i] = 0.f;
  const uint32_t a = ptx::shared_address(a_tile);
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int stage = tile % 2;
    if (kFault != HopperFault::kNoFullWait)
      ptx::mbarrier_wait(full + stage, (tile / 2 + (kFault == HopperFault::kWrongParity)) % 2);
    const uint32_t b = ptx::shared_address(stages + stage * kTileBytes);
    ptx::settle(d);
    if (kFault != HopperFault::kNoProductFence) ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint64_t right = ptx::matrix_descriptor(b + step * 32, 16, kPatternBytes);
      if (kFault == HopperFault::kWrongSwizzle) right ^= static_cast<uint64_t>(3) << 62;  // 64 bytes
      ptx::wgmma<false>(BFloat16(), d, ptx::matrix_descriptor(a + step * 32, 16, kPatternBytes), right, true);
    }
    ptx::wgmma_commit();
    if (kFault == HopperFault::kEarlyRelease && threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(empty + stage);
    if (kFault != HopperFault::kNoProductWait) ptx::wgmma_wait<0>();
    ptx::settle(d);
    if (kFault != HopperFault::kEarlyRelease && threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(empty + stage);
  }
  for (int i = 0; i < kSize / 2; ++i) {
    const int row = threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4 + i / 2 % 2 * 8;
    p.out[row * kSize + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
  }
  if (kFault == HopperFault::kNoProductWait) ptx::wgmma_wait<0>();
}

// 128 registers at the launch of 512 threads: 24 and 3 x 160 are less than all, 24 and 3 x 168 are more.
template <RegisterFault kFault>
__global__ void registers_kernel(const __grid_constant__ PipelineParams) {
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == 0) {
    if (kFault != RegisterFault::kOneWarp || threadIdx.x >= kWarp) ptx::give_registers<24>();
  } else {
    ptx::take_registers<kFault == RegisterFault::kTooMany ? 168 : 160>();
  }
}

template <class T, int kN>
void run_product(const ProductProbe& p) {
  const auto run = [&](void (*kernel)(ProductParams)) {
    ProductParams params{matrix_map(p.a, kSize, p.is_float16), {}, p.c, p.out};
    const int rows = p.b_transposed ? kSize : kN, columns = p.b_transposed ? kN : kSize;
    if (!make_tensor_map(params.b, p.b, p.is_float16, 2, {columns, rows, 1, 1}, {1, columns, 0, 0}, {kSize, kSize, 1, 1}))
      throw std::runtime_error("no tensor map");
    launch("product", kernel, 1, kWarpgroup, (1 + kN / kSize) * kTileBytes + 8, nullptr, params);
  };
  if (p.b_transposed)
    run(p.a_in_registers ? product_kernel<T, kN, true, true> : product_kernel<T, kN, true, false>);
  else
    run(p.a_in_registers ? product_kernel<T, kN, false, true> : product_kernel<T, kN, false, false>);
}

template <HopperFault kFault>
void run_pipeline(const PipelineParams& p) {
  launch("tensor_pipeline", tensor_pipeline_kernel<kFault>, 1, kWarpgroup + kWarp, 3 * kTileBytes + 32, nullptr, p);
}

}  // namespace

bool probe_tensor_copy(const TensorCopyProbe& p) {
  CopyParams params{{}, p.rank, kSwizzleBytes * p.box[1] * p.box[2] * p.box[3], {}, static_cast<uint32_t*>(p.out)};
  for (int d = 0; d < 4; ++d) params.at[d] = p.at[d];
  if (!make_tensor_map(params.map, p.data, false, p.rank, p.size, p.stride, p.box)) return false;
  launch("tensor_copy", tensor_copy_kernel, 1, kWarp, params.bytes + 8, nullptr, params);
  return true;
}

void probe_product(const ProductProbe& p) {
  if (p.n == 64) return p.is_float16 ? run_product<Float16, 64>(p) : run_product<BFloat16, 64>(p);
  if (p.n == 128) return p.is_float16 ? run_product<Float16, 128>(p) : run_product<BFloat16, 128>(p);
  throw std::runtime_error("64 or 128 columns");
}

void probe_registers(RegisterFault fault) {
  const auto run = [](void (*kernel)(PipelineParams)) {
    launch("registers", kernel, 1, 4 * kWarpgroup, 0, nullptr, PipelineParams{});
  };
  switch (fault) {
    case RegisterFault::kNone: return run(registers_kernel<RegisterFault::kNone>);
    case RegisterFault::kTooMany: return run(registers_kernel<RegisterFault::kTooMany>);
    case RegisterFault::kOneWarp: return run(registers_kernel<RegisterFault::kOneWarp>);
  }
}

void probe_tensor_pipeline(HopperFault fault, const PipelineProbe& probe) {
  const PipelineParams p{matrix_map(probe.b, probe.tiles * kSize, false), static_cast<const uint32_t*>(probe.a), probe.out,
                         probe.tiles};
  switch (fault) {
    case HopperFault::kNone: return run_pipeline<HopperFault::kNone>(p);
    case HopperFault::kWrongParity: return run_pipeline<HopperFault::kWrongParity>(p);
    case HopperFault::kNoFullWait: return run_pipeline<HopperFault::kNoFullWait>(p);
    case HopperFault::kNoEmptyWait: return run_pipeline<HopperFault::kNoEmptyWait>(p);
    case HopperFault::kEarlyRelease: return run_pipeline<HopperFault::kEarlyRelease>(p);
    case HopperFault::kNoProductWait: return run_pipeline<HopperFault::kNoProductWait>(p);
    case HopperFault::kNoProductFence: return run_pipeline<HopperFault::kNoProductFence>(p);
    case HopperFault::kWrongSwizzle: return run_pipeline<HopperFault::kWrongSwizzle>(p);
    case HopperFault::kFewBytes: return run_pipeline<HopperFault::kFewBytes>(p);
    case HopperFault::kManyBytes: return run_pipeline<HopperFault::kManyBytes>(p);
    case HopperFault::kNoInitFence: return run_pipeline<HopperFault::kNoInitFence>(p);
    case HopperFault::kNoProxyFence: return run_pipeline<HopperFault::kNoProxyFence>(p);
  }
}

}  // namespace hierkernels::cuda

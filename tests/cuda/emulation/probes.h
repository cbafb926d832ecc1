// Kernels that prove the emulation. What they compute: probes.cu.
#pragma once
#include <cstdint>
#include <string>

namespace hierkernels::cuda {

enum class Fault { kNone, kNoBarrier, kNoSecondBarrier, kNoWait, kUnwritten, kOutOfBounds };

enum class Misuse {
  kBarrierNotReached,
  kLaneMissing,
  kDivergence,
  kCopyNotAwaited,
  kUnalignedCopy,
  kGlobalOutOfBounds,
  kUnorderedWithinWarp,
};

struct TileParams {
  const float* in;
  float* out;
  int tiles;
};

struct MisuseParams {
  Misuse misuse;
  float* data;
};

// One warp (two where shuffles are probed) runs the instruction `name` on the words of its lanes.
void probe_words(const std::string& name, const uint32_t* a, const uint32_t* b, const float* c, uint32_t* out);
void probe_transpose(Fault fault, const TileParams& p);
void probe_pipeline(Fault fault, const TileParams& p);
void probe_misuse(const MisuseParams& p);

// ---- sm_90a: probes_hopper.cu ----

enum class HopperFault {
  kNone,
  kWrongParity,        // the consumers wait for the phase before
  kNoFullWait,         // ... or not at all
  kNoEmptyWait,        // the producer fills a stage that may still be read
  kEarlyRelease,       // a stage is released while its product runs
  kNoProductWait,      // the sums are read while products run
  kNoProductFence,
  kWrongSwizzle,       // in the descriptor
  kFewBytes,           // fewer are announced than come
  kManyBytes,
  kNoInitFence,        // after the initialisation of mbarriers
  kNoProxyFence,       // between stores to shared memory and the product that reads them
};

// Four warpgroups, of which the first gives registers and the others take some.
enum class RegisterFault {
  kNone,
  kTooMany,  // more are taken than were given
  kOneWarp,  // one warp of a warpgroup gives none
};
void probe_registers(RegisterFault fault);

// One copy of a box; `out` is the image that it leaves in shared memory.
struct TensorCopyProbe {
  const void* data;
  int rank;
  int64_t size[4], stride[4];
  int box[4], at[4];
  void* out;
};
bool probe_tensor_copy(const TensorCopyProbe& p);  // false: tensor copies cannot take it

// out (64, n) = c + a b, with a (64, 64), b (64, n), or (n, 64) unless it is transposed.
struct ProductProbe {
  const void *a, *b;
  const float* c;
  float* out;
  int n;
  bool is_float16, b_transposed, a_in_registers;
};
void probe_product(const ProductProbe& p);

// out (64, 64) = the sum over tiles of a b_i^T, all 64 x 64, by a warp that copies and four that multiply.
struct PipelineProbe {
  const void *a, *b;
  float* out;
  int tiles;
};
void probe_tensor_pipeline(HopperFault fault, const PipelineProbe& p);

}  // namespace hierkernels::cuda

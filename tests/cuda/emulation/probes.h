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

}  // namespace hierkernels::cuda

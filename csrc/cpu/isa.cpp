#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hierkernels {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
constexpr int kLevels = sizeof kNames / sizeof *kNames;

#if defined(HIERKERNELS_X86)
// AMX state is off until the process asks for it (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA); threads inherit it.
bool request_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx_bf16() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1);
}

Isa detect() {
  // __builtin_cpu_supports looks at the state the operating system enables, too.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return has_amx_bf16() && request_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa detect() { return Isa::kGeneric; }
#endif

Isa& current() {
  static Isa isa = [] {
    const char* cap = std::getenv("HIERKERNELS_CPU_ISA");
    Isa found = detected_isa();
    for (int i = 0; cap && i < kLevels; ++i)
      if (!std::strcmp(cap, kNames[i]) && i < static_cast<int>(found)) found = static_cast<Isa>(i);
    return found;
  }();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return current(); }

bool set_isa(const char* name) {
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i)
    if (!std::strcmp(name, kNames[i])) {
      current() = static_cast<Isa>(i);
      return true;
    }
  return false;
}

}  // namespace hierkernels

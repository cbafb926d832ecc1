// The wrappers of csrc/cuda/common/ptx_hopper.h, same names and meaning, for the host's compiler.
#pragma once

namespace hierkernels::cuda::ptx {

inline void mbarrier_init(uint64_t* barrier, int count) { emulation::mbarrier_init(barrier, count); }
inline void mbarrier_arrive(uint64_t* barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  emulation::mbarrier_arrive(barrier, static_cast<uint32_t>(bytes));
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  return emulation::mbarrier_try_wait(barrier, parity);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

inline void fence_mbarrier_init() { emulation::fence_mbarrier_init(); }
inline void fence_proxy_async() { emulation::fence_proxy_async(); }

inline void tensor_copy(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
  emulation::tensor_copy(to, *map, barrier, 2, {c0, c1, 0, 0});
}
inline void tensor_copy(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  emulation::tensor_copy(to, *map, barrier, 3, {c0, c1, c2, 0});
}
inline void tensor_copy(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  emulation::tensor_copy(to, *map, barrier, 4, {c0, c1, c2, c3});
}

template <int kRegisters>
void give_registers() {
  emulation::set_registers(kRegisters);
}
template <int kRegisters>
void take_registers() {
  emulation::set_registers(kRegisters);
}

template <int kN>
void settle(float (&)[kN]) {}
template <int kM, int kN>
void settle(uint32_t (&)[kM][kN]) {}

inline void wgmma_fence() { emulation::wgmma_fence(); }
inline void wgmma_commit() { emulation::wgmma_commit(); }
template <int kGroups>
void wgmma_wait() {
  emulation::wgmma_wait(kGroups);
}

template <bool kBTransposed, class T, int kRegisters>
void wgmma(T, float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  constexpr auto kElement = std::is_same_v<T, BFloat16> ? emulation::Element::kBFloat16 : emulation::Element::kFloat16;
  emulation::wgmma(kElement, 2 * kRegisters, d, nullptr, a, b, accumulate, kBTransposed);
}
template <bool kBTransposed, class T, int kRegisters>
void wgmma(T, float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr auto kElement = std::is_same_v<T, BFloat16> ? emulation::Element::kBFloat16 : emulation::Element::kFloat16;
  emulation::wgmma(kElement, 2 * kRegisters, d, a, 0, b, accumulate, kBTransposed);
}

}  // namespace hierkernels::cuda::ptx

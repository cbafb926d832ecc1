// Test code: runs CUDA kernels on the CPU, to prove them where there is no GPU. Never a backend for users.
//
// One block at a time. Each thread of the block is a fiber. Between synchronisation points threads run in a random
// order that a seed decides, shared memory starts as NaN, asynchronous copies arrive as late as they may, and
// accesses to shared memory that no barrier orders are reported, as are accesses outside of the tensors of a call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hierkernels::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Options {
  uint64_t seed = 1;
  bool races = true;    // look for races: twice the time
  bool bounds = false;  // look at accesses to global memory, which must then be declared by allow()
  bool hopper = false;  // the device is an sm_90: kernels of sm_90a are chosen where they serve
};
Options& options();

// Counts since the last reset.
struct Counts {
  uint64_t blocks = 0, switches = 0, mma = 0, ldmatrix = 0, wgmma = 0, tensor_copies = 0;
  uint64_t bank_conflicts = 0;  // ldmatrix matrices of which two rows share banks
};
Counts& counts();

// A kernel may read (or write) these bytes of global memory, until forbid_all().
void allow(const void* begin, size_t bytes);
void forbid_all();

// A kernel and its parameters, of whatever types.
struct Kernel {
  const char* name;
  void (*call)(const Kernel& self);
  void (*function)();
  const void* params;
};

// Runs the kernel for each thread of each block. Throws std::runtime_error, named after the kernel, block and
// thread, at the first error: a race, an access out of bounds, a deadlock, a misused instruction.
void run(const Kernel& kernel, Index grid, Index block, size_t shared_bytes);

// Calls a kernel with a copy of its parameters, as a launch does. What a launch reads is not the kernel's access.
template <class Params>
__attribute__((noinline, no_sanitize("thread"))) void call(const Kernel& self) {
  reinterpret_cast<void (*)(Params)>(self.function)(*static_cast<const Params*>(self.params));
}
template <class Params>
Kernel bind(const char* name, void (*kernel)(Params), const Params& params) {
  return {name, call<Params>, reinterpret_cast<void (*)()>(kernel), &params};
}

// ---- what a running thread sees; called through language.h and ptx_emulation.h ----

Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
unsigned char* shared_memory();
uint32_t shared_offset(const void* p);  // of an address in shared memory
int lane();

void barrier(int id, int threads, bool wait);  // threads = 0: the whole block
void sync_warp(uint32_t mask);
uint64_t shuffle(uint32_t mask, uint64_t value, int from_lane);
uint32_t ballot(uint32_t mask, bool vote);

enum class Element { kBFloat16, kFloat16, kTf32 };
void ldmatrix(uint32_t (&r)[4], bool transposed, const void* row);
void mma(Element element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void cp_async(void* to, const void* from, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups);

// ---- sm_90a: async_copies.cpp and warpgroup.cpp ----

// What a CUtensorMap says: a tensor of 16-bit numbers with up to 4 dimensions, the first one contiguous, of which
// copies take boxes that are 128 bytes wide, swizzled by 128 bytes.
struct TensorMap {
  const unsigned char* data;
  int rank;
  uint64_t size[4], stride[4];  // strides in bytes
  uint32_t box[4];
};

void mbarrier_init(const void* barrier, int count);
void mbarrier_arrive(const void* barrier, uint32_t expected_bytes);
bool mbarrier_try_wait(const void* barrier, uint32_t parity);
void fence_mbarrier_init();
void fence_proxy_async();
void set_registers(int count);  // setmaxnreg
void tensor_copy(void* to, const TensorMap& map, const void* barrier, int rank, const int (&at)[4]);

// d (64 x n) (+)= a b; `a` from the words of the lanes, or from a descriptor if they are null.
void wgmma(Element element, int n, float* d, const uint32_t* a_words, uint64_t a, uint64_t b, bool accumulate,
           bool b_transposed);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

}  // namespace hierkernels::emulation

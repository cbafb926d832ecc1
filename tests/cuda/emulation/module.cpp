// The Python module of the tests: the emulation's options and probes, and the library's CUDA operators, emulated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../../csrc/bindings.h"
#include "emulation.h"
#include "probes.h"

namespace py = pybind11;
namespace cuda = hierkernels::cuda;
namespace emulation = hierkernels::emulation;

namespace {

void bind_hopper_probes(py::module_& m) {
  using cuda::HopperFault;
  py::enum_<HopperFault>(m, "HopperFault")
      .value("none", HopperFault::kNone)
      .value("wrong_parity", HopperFault::kWrongParity)
      .value("no_full_wait", HopperFault::kNoFullWait)
      .value("no_empty_wait", HopperFault::kNoEmptyWait)
      .value("early_release", HopperFault::kEarlyRelease)
      .value("no_product_wait", HopperFault::kNoProductWait)
      .value("no_product_fence", HopperFault::kNoProductFence)
      .value("wrong_swizzle", HopperFault::kWrongSwizzle)
      .value("few_bytes", HopperFault::kFewBytes)
      .value("many_bytes", HopperFault::kManyBytes)
      .value("no_init_fence", HopperFault::kNoInitFence)
      .value("no_proxy_fence", HopperFault::kNoProxyFence);
  py::enum_<cuda::RegisterFault>(m, "RegisterFault")
      .value("none", cuda::RegisterFault::kNone)
      .value("too_many", cuda::RegisterFault::kTooMany)
      .value("one_warp", cuda::RegisterFault::kOneWarp);
  m.def("probe_registers", cuda::probe_registers);
  m.def("probe_tensor_copy", [](uintptr_t data, const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
                                const std::vector<int>& box, const std::vector<int>& at, uintptr_t out) {
    cuda::TensorCopyProbe p{reinterpret_cast<void*>(data), static_cast<int>(size.size()), {1, 1, 1, 1}, {}, {1, 1, 1, 1},
                            {}, reinterpret_cast<void*>(out)};
    for (size_t d = 0; d < size.size(); ++d) {
      p.size[d] = size[d];
      p.stride[d] = stride[d];
      p.box[d] = box[d];
      p.at[d] = at[d];
    }
    return cuda::probe_tensor_copy(p);
  });
  m.def("probe_product", [](uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t out, int n, bool is_float16, bool b_transposed,
                            bool a_in_registers) {
    cuda::probe_product({reinterpret_cast<void*>(a), reinterpret_cast<void*>(b), reinterpret_cast<float*>(c),
                         reinterpret_cast<float*>(out), n, is_float16, b_transposed, a_in_registers});
  });
  m.def("probe_tensor_pipeline", [](HopperFault fault, uintptr_t a, uintptr_t b, uintptr_t out, int tiles) {
    cuda::probe_tensor_pipeline(fault, {reinterpret_cast<void*>(a), reinterpret_cast<void*>(b),
                                        reinterpret_cast<float*>(out), tiles});
  });
}

}  // namespace

PYBIND11_MODULE(_cuda_emulation, m) {
  hierkernels::find_exchange();
  hierkernels::bind_cuda(m);
  hierkernels::tensor_observer = [](const hierkernels::Tensor& t) {
    if (t.data) emulation::allow(t.data, static_cast<size_t>(t.span_bytes()));
  };
  m.doc() = "CUDA kernels run on the CPU by the emulation of tests/cuda/emulation: for tests only.";

  m.def("set_options", [](uint64_t seed, bool races, bool bounds, bool hopper) {
    emulation::options() = {seed, races, bounds, hopper};
  }, py::arg("seed"), py::arg("races") = true, py::arg("bounds") = true, py::arg("hopper") = false);
  m.def("take_counts", [] {
    const emulation::Counts c = emulation::counts();
    emulation::counts() = {};
    py::dict d;
    d["blocks"] = c.blocks;
    d["switches"] = c.switches;
    d["mma"] = c.mma;
    d["ldmatrix"] = c.ldmatrix;
    d["bank_conflicts"] = c.bank_conflicts;
    d["wgmma"] = c.wgmma;
    d["tensor_copies"] = c.tensor_copies;
    return d;
  });
  m.def("allow", [](uintptr_t begin, size_t bytes) { emulation::allow(reinterpret_cast<void*>(begin), bytes); });
  m.def("forbid_all", emulation::forbid_all);

  py::enum_<cuda::Fault>(m, "Fault")
      .value("none", cuda::Fault::kNone)
      .value("no_barrier", cuda::Fault::kNoBarrier)
      .value("no_second_barrier", cuda::Fault::kNoSecondBarrier)
      .value("no_wait", cuda::Fault::kNoWait)
      .value("unwritten", cuda::Fault::kUnwritten)
      .value("out_of_bounds", cuda::Fault::kOutOfBounds);
  py::enum_<cuda::Misuse>(m, "Misuse")
      .value("barrier_not_reached", cuda::Misuse::kBarrierNotReached)
      .value("lane_missing", cuda::Misuse::kLaneMissing)
      .value("divergence", cuda::Misuse::kDivergence)
      .value("copy_not_awaited", cuda::Misuse::kCopyNotAwaited)
      .value("unaligned_copy", cuda::Misuse::kUnalignedCopy)
      .value("global_out_of_bounds", cuda::Misuse::kGlobalOutOfBounds)
      .value("unordered_within_warp", cuda::Misuse::kUnorderedWithinWarp);

  m.def("probe_words", [](const std::string& name, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t out) {
    cuda::probe_words(name, reinterpret_cast<const uint32_t*>(a), reinterpret_cast<const uint32_t*>(b),
                      reinterpret_cast<const float*>(c), reinterpret_cast<uint32_t*>(out));
  });
  const auto tile = [](uintptr_t in, uintptr_t out, int tiles) {
    return cuda::TileParams{reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), tiles};
  };
  m.def("probe_transpose", [tile](cuda::Fault fault, uintptr_t in, uintptr_t out) {
    cuda::probe_transpose(fault, tile(in, out, 1));
  });
  m.def("probe_pipeline", [tile](cuda::Fault fault, uintptr_t in, uintptr_t out, int tiles) {
    cuda::probe_pipeline(fault, tile(in, out, tiles));
  });
  m.def("probe_misuse", [](cuda::Misuse misuse, uintptr_t data) {
    cuda::probe_misuse({misuse, reinterpret_cast<float*>(data)});
  });
  bind_hopper_probes(m);
}

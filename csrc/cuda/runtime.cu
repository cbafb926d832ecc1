#include "common/device.h"
#include "operators.h"

namespace hierkernels::cuda {

int runtime_version() {
#if defined(__CUDACC__)
  return CUDART_VERSION;
#else
  return 0;
#endif
}

}  // namespace hierkernels::cuda

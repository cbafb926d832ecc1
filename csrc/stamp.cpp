// What the core was built from, as setup.py says; a file of its own, since it changes with every source.
#include "stamp.h"

namespace hierkernels {

const char* built_from() { return HIERKERNELS_STAMP; }

}  // namespace hierkernels

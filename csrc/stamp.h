#pragma once

namespace hierkernels {

// Version and digests: hierkernels/core_stamp.py.
const char* built_from();

}  // namespace hierkernels

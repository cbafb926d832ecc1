// Which instruction set the CPU kernels use: what the machine has, capped by HIERKERNELS_CPU_ISA.
#pragma once
#include "attention/attention.h"

namespace hierkernels {

const char* isa_name(Isa isa);
Isa detected_isa();               // the best one this process may use (operating-system state included)
Isa active_isa();                 // detected, or the cap if that is lower
bool set_isa(const char* name);   // caps it; false: no such name, or above what was detected

}  // namespace hierkernels

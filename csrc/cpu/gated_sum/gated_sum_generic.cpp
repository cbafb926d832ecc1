#define HK_ISA generic
#include "gated_sum.inl"

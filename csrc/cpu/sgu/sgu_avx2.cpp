#define HK_ISA avx2
#include "sgu.inl"

#define HK_ISA avx2
#include "attention.inl"

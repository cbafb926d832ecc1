#define HK_ISA avx512
#include "attention.inl"

#define HK_ISA avx512
#include "rowwise.inl"

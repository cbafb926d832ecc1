#define HK_ISA avx2
#include "rowwise.inl"

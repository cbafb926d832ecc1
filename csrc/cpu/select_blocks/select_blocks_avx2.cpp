#define HK_ISA avx2
#include "select_blocks.inl"

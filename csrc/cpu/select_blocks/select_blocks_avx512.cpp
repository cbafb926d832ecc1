#define HK_ISA avx512
#include "select_blocks.inl"

#define HK_ISA avx512
#include "selected_attention.inl"

#define HK_ISA avx2
#include "selected_attention.inl"

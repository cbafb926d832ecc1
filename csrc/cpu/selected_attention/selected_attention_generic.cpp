#define HK_ISA generic
#include "selected_attention.inl"

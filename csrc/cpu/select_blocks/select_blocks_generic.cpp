#define HK_ISA generic
#include "select_blocks.inl"

#define HK_ISA generic
#include "sgu.inl"

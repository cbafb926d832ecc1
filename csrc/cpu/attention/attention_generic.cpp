#define HK_ISA generic
#include "attention.inl"

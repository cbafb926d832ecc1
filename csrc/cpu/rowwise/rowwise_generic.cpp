#define HK_ISA generic
#include "rowwise.inl"

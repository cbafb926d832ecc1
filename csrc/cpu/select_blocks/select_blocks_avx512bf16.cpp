// bfloat16, by dot products of pairs.
#define HK_ISA avx512bf16
#include "../selected_attention/pair_operands.h"

#include "select_blocks.inl"

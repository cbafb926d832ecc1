#define HK_ISA avx512bf16
#define HK_WORDS_OF_BF16
#include "product.inl"

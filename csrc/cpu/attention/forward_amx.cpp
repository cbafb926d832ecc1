#define HK_ISA amx
#include "amx_products.h"
#include "forward_bf16.inl"

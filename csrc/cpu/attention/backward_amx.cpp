#define HK_ISA amx
#include "amx_products.h"
#include "backward_bf16.inl"

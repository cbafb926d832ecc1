// HIERKERNELS_ANYWHERE: a function that kernels on a GPU may call too.
#pragma once

#if defined(__CUDACC__)
#define HIERKERNELS_ANYWHERE __host__ __device__
#else
#define HIERKERNELS_ANYWHERE
#endif

// VPFAST_EVERYWHERE: a function that CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define VPFAST_EVERYWHERE __host__ __device__
#else
#define VPFAST_EVERYWHERE
#endif

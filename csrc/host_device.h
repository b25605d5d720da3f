// One spelling for a function that both the C++ and the CUDA compiler inline.
#pragma once

#if defined(__CUDACC__)
#define PECKER_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: cpu/*_kernels.cpp are compiled once per instruction set, and a shared out-of-line copy of
// one of these functions could be the AVX-512 one.
#define PECKER_HOST_DEVICE inline __attribute__((always_inline))
#endif

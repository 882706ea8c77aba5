// Kernels for x86-64 processors with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common.h"

// after the system's headers, so that none of their functions is compiled for this instruction set
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FFF_ISA avx2
#define FFF_ISA_AVX2
#define FFF_ISA_NAME "avx2"
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

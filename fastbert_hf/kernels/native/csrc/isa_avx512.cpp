// Kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common.h"

// after the system's headers, so that none of their functions is compiled for this instruction set
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FFF_ISA avx512
#define FFF_ISA_AVX512
#define FFF_ISA_NAME "avx512"
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

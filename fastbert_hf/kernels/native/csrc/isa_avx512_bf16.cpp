// Kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL) and its products of bfloat16 pairs (BF16). Compilers
// that do not know these leave the file empty.
#include "common.h"

#if defined(FFF_HAS_AVX512_BF16)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// after the system's headers, so that none of their functions is compiled for this instruction set
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FFF_ISA avx512_bf16
#define FFF_ISA_AVX512
#define FFF_BF16_PRODUCTS
#define FFF_ISA_NAME "avx512_bf16"
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

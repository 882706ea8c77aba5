// Products with int8 weights for x86-64 processors with AVX-512 VNNI; everything else is that of AVX-512.
#include "common.h"

#if defined(FFF_HAS_AVX512_VNNI)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// after the system's headers, so that none of their functions is compiled for this instruction set
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif

#define FFF_ISA avx512_vnni
#define FFF_ISA_AVX512_VNNI
#define FFF_INLINE static inline __attribute__((always_inline))
#include "int8_products.h"

namespace fff {
namespace avx512_vnni {

extern const Int8Products products;
const Int8Products products = int8_products;

}  // namespace avx512_vnni
}  // namespace fff

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

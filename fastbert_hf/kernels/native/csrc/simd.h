// Vector primitives of one instruction set, chosen by the translation unit that includes this file
// (FFF_ISA_AVX512, FFF_ISA_AVX2, or neither for plain vectors of four floats). FFF_BF16_PRODUCTS beside the first:
// the processor multiplies bfloat16.
//
// bfloat16 rows are read two vectors at a time: 2 * kWidth consecutive elements become the vector of the even
// elements and the vector of the odd ones, which costs a shift and a mask and is exact. Sums do not care about that
// order as long as every row uses it.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FFF_INLINE static inline __attribute__((always_inline))

namespace fff {
namespace FFF_ISA {

#if defined(FFF_ISA_AVX512)

typedef __m512 vec;
constexpr int kWidth = 16;

FFF_INLINE vec zero() { return _mm512_setzero_ps(); }
FFF_INLINE vec broadcast(float a) { return _mm512_set1_ps(a); }
FFF_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
FFF_INLINE void store(float* p, vec a) { _mm512_storeu_ps(p, a); }
FFF_INLINE void stream(float* p, vec a) { _mm512_stream_ps(p, a); }
FFF_INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
FFF_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
FFF_INLINE __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1u); }
FFF_INLINE vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FFF_INLINE void store_first(float* p, vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }

FFF_INLINE float sum_lanes(vec a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

// four sums at once, each in the order of sum_lanes
FFF_INLINE void sum_lanes4(vec a, vec b, vec c, vec d, float* out) {
  const vec in[4] = {a, b, c, d};
  __m128 half[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m256 e = _mm256_add_ps(_mm512_castps512_ps256(in[i]), _mm512_extractf32x8_ps(in[i], 1));
    half[i] = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  }
  __m128 ab = _mm_add_ps(_mm_unpacklo_ps(half[0], half[1]), _mm_unpackhi_ps(half[0], half[1]));
  __m128 cd = _mm_add_ps(_mm_unpacklo_ps(half[2], half[3]), _mm_unpackhi_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

FFF_INLINE void split_bf16(__m512i pairs, vec* even, vec* odd) {
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}
FFF_INLINE void load_bf16(const uint16_t* p, vec* even, vec* odd) { split_bf16(_mm512_loadu_si512(p), even, odd); }
FFF_INLINE void load_bf16_first(const uint16_t* p, int n, vec* even, vec* odd) {
  split_bf16(_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p), even, odd);
}
// nearest even, as torch rounds; the result sits in the upper half of each lane
FFF_INLINE __m512i round_bf16(vec a) {
  __m512i bits = _mm512_castps_si512(a);
  __m512i lowest = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(lowest, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
FFF_INLINE __m512i join_bf16(vec even, vec odd) {
  __m512i upper = _mm512_and_si512(round_bf16(odd), _mm512_set1_epi32((int)0xffff0000));
  return _mm512_or_si512(upper, _mm512_srli_epi32(round_bf16(even), 16));
}
FFF_INLINE void store_bf16(uint16_t* p, vec even, vec odd) { _mm512_storeu_si512(p, join_bf16(even, odd)); }
FFF_INLINE void stream_bf16(uint16_t* p, vec even, vec odd) {
  _mm512_stream_si512((__m512i*)p, join_bf16(even, odd));
}
FFF_INLINE void store_bf16_first(uint16_t* p, vec even, vec odd, int n) {
  _mm512_mask_storeu_epi16(p, (__mmask32)((1ull << n) - 1), join_bf16(even, odd));
}

#elif defined(FFF_ISA_AVX2)

typedef __m256 vec;
constexpr int kWidth = 8;

FFF_INLINE vec zero() { return _mm256_setzero_ps(); }
FFF_INLINE vec broadcast(float a) { return _mm256_set1_ps(a); }
FFF_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
FFF_INLINE void store(float* p, vec a) { _mm256_storeu_ps(p, a); }
FFF_INLINE void stream(float* p, vec a) { _mm256_stream_ps(p, a); }
FFF_INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
FFF_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
FFF_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FFF_INLINE vec load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
FFF_INLINE void store_first(float* p, vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }

FFF_INLINE float sum_lanes(vec a) {
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

// four sums at once, each in the order of sum_lanes
FFF_INLINE void sum_lanes4(vec a, vec b, vec c, vec d, float* out) {
  const vec in[4] = {a, b, c, d};
  __m128 half[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) half[i] = _mm_add_ps(_mm256_castps256_ps128(in[i]), _mm256_extractf128_ps(in[i], 1));
  __m128 ab = _mm_add_ps(_mm_unpacklo_ps(half[0], half[1]), _mm_unpackhi_ps(half[0], half[1]));
  __m128 cd = _mm_add_ps(_mm_unpacklo_ps(half[2], half[3]), _mm_unpackhi_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

FFF_INLINE void split_bf16(__m256i pairs, vec* even, vec* odd) {
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
}
FFF_INLINE void load_bf16(const uint16_t* p, vec* even, vec* odd) {
  split_bf16(_mm256_loadu_si256((const __m256i*)p), even, odd);
}
FFF_INLINE __m256i round_bf16(vec a) {
  __m256i bits = _mm256_castps_si256(a);
  __m256i lowest = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(lowest, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
FFF_INLINE __m256i join_bf16(vec even, vec odd) {
  __m256i upper = _mm256_and_si256(round_bf16(odd), _mm256_set1_epi32((int)0xffff0000));
  return _mm256_or_si256(upper, _mm256_srli_epi32(round_bf16(even), 16));
}
FFF_INLINE void store_bf16(uint16_t* p, vec even, vec odd) { _mm256_storeu_si256((__m256i*)p, join_bf16(even, odd)); }
FFF_INLINE void stream_bf16(uint16_t* p, vec even, vec odd) {
  _mm256_stream_si256((__m256i*)p, join_bf16(even, odd));
}

#else

typedef float vec __attribute__((vector_size(16)));
constexpr int kWidth = 4;

FFF_INLINE vec zero() { return vec{0, 0, 0, 0}; }
FFF_INLINE vec broadcast(float a) { return vec{a, a, a, a}; }
FFF_INLINE vec load(const float* p) {
  vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
FFF_INLINE void store(float* p, vec a) { memcpy(p, &a, sizeof a); }
FFF_INLINE void stream(float* p, vec a) { store(p, a); }
FFF_INLINE vec add(vec a, vec b) { return a + b; }
#if defined(__aarch64__)
// one instruction, which every 64-bit Arm has; the plain expression is two, as the build allows no contraction
FFF_INLINE vec fma(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
FFF_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
#endif
FFF_INLINE vec load_first(const float* p, int n) {
  float lanes[kWidth] = {0};
  memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
}
FFF_INLINE void store_first(float* p, vec a, int n) {
  float lanes[kWidth];
  store(lanes, a);
  memcpy(p, lanes, n * sizeof(float));
}
FFF_INLINE float sum_lanes(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
FFF_INLINE void sum_lanes4(vec a, vec b, vec c, vec d, float* out) {
  out[0] = sum_lanes(a);
  out[1] = sum_lanes(b);
  out[2] = sum_lanes(c);
  out[3] = sum_lanes(d);
}

FFF_INLINE void load_bf16(const uint16_t* p, vec* even, vec* odd) {
  for (int i = 0; i < kWidth; ++i) {
    uint32_t lower = (uint32_t)p[2 * i] << 16, upper = (uint32_t)p[2 * i + 1] << 16;
    memcpy((char*)even + 4 * i, &lower, 4);
    memcpy((char*)odd + 4 * i, &upper, 4);
  }
}
FFF_INLINE uint16_t round_bf16(float a) {
  uint32_t word;
  memcpy(&word, &a, 4);
  return a != a ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
FFF_INLINE void store_bf16(uint16_t* p, vec even, vec odd) {
  for (int i = 0; i < kWidth; ++i) {
    p[2 * i] = round_bf16(even[i]);
    p[2 * i + 1] = round_bf16(odd[i]);
  }
}
FFF_INLINE void stream_bf16(uint16_t* p, vec even, vec odd) { store_bf16(p, even, odd); }

#endif

#if !defined(FFF_ISA_AVX512)
FFF_INLINE void load_bf16_first(const uint16_t* p, int n, vec* even, vec* odd) {
  uint16_t elements[2 * kWidth] = {0};
  memcpy(elements, p, n * sizeof(uint16_t));
  load_bf16(elements, even, odd);
}
FFF_INLINE void store_bf16_first(uint16_t* p, vec even, vec odd, int n) {
  uint16_t elements[2 * kWidth];
  store_bf16(elements, even, odd);
  memcpy(p, elements, n * sizeof(uint16_t));
}
#endif

// Keeps a value that several products share in a register; compilers would load it again for each of them.
template <class V>
FFF_INLINE V in_register(V a) {
#if defined(__x86_64__)
  asm("" : "+v"(a));
#endif
  return a;
}

constexpr int kPair = 2 * kWidth;  // elements that two vectors hold

// Into the second-level cache: prefetches into the first one queue behind its few outstanding misses and bring half
// the bandwidth from memory. Rows are asked for kAhead steps early.
constexpr int kAhead = 2;
FFF_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i, 0, 2);
}

// A matrix larger than a core's share of the caches is written past them (`stream`): reading its old contents first
// costs memory traffic, and keeping it pushes the weights out. Needs rows that begin at cache lines.
FFF_INLINE bool should_stream(const void* matrix, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= 8 << 20 && row_bytes % 64 == 0 && (uintptr_t)matrix % 64 == 0;
}
// to be called by a thread that has streamed, before others read what it wrote
FFF_INLINE void finish_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// How rows of one element type are read and written, a pair of vectors at a time. For sums of products of two rows:
// `factor` is the element type of the row beside one of this type, and where they are the same a vector of either
// (kLanes elements) is read by load_lanes and multiplied by multiply_add.
struct F32 {
  typedef float type, factor;
  static constexpr bool kIsFloat = true, kWidens = false;
  static constexpr int kLanes = kWidth;
  FFF_INLINE vec load_lanes(const float* p) { return load(p); }
  FFF_INLINE vec load_lanes_first(const float* p, int n) {
    return n > 0 ? load_first(p, n < kWidth ? n : kWidth) : zero();
  }
  FFF_INLINE vec multiply_add(vec a, vec b, vec sum) { return fma(a, b, sum); }
  FFF_INLINE float one() { return 1.0f; }
  FFF_INLINE float widen(float a) { return a; }
  FFF_INLINE void load2(const float* p, vec* a, vec* b) {
    *a = load(p);
    *b = load(p + kWidth);
  }
  FFF_INLINE void load2_first(const float* p, int n, vec* a, vec* b) {
    *a = load_first(p, n < kWidth ? n : kWidth);
    *b = n > kWidth ? load_first(p + kWidth, n - kWidth) : zero();
  }
  FFF_INLINE void store2(float* p, vec a, vec b) {
    store(p, a);
    store(p + kWidth, b);
  }
  FFF_INLINE void stream2(float* p, vec a, vec b) {
    stream(p, a);
    stream(p + kWidth, b);
  }
  FFF_INLINE void store2_first(float* p, vec a, vec b, int n) {
    store_first(p, a, n < kWidth ? n : kWidth);
    if (n > kWidth) store_first(p + kWidth, b, n - kWidth);
  }
};

struct BF16 {
  typedef uint16_t type;
  static constexpr bool kIsFloat = false;
#if defined(FFF_BF16_PRODUCTS)
  // Two products and two sums a lane, each rounded to float32. The instruction takes subnormal elements and sums for
  // zeros (below 1.2e-38), where all other sums here keep them.
  typedef uint16_t factor;
  static constexpr bool kWidens = false;
  static constexpr int kLanes = kPair;
  FFF_INLINE __m512i load_lanes(const uint16_t* p) { return _mm512_loadu_si512(p); }
  FFF_INLINE __m512i load_lanes_first(const uint16_t* p, int n) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
  }
  FFF_INLINE vec multiply_add(__m512i a, __m512i b, vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
#else
  typedef float factor;  // rows of floats as load2 orders them
  static constexpr bool kWidens = true;
#endif
  FFF_INLINE uint16_t one() { return 0x3f80; }
  FFF_INLINE float widen(uint16_t a) {
    const uint32_t word = (uint32_t)a << 16;
    float wide;
    memcpy(&wide, &word, 4);
    return wide;
  }
  FFF_INLINE void load2(const uint16_t* p, vec* a, vec* b) { load_bf16(p, a, b); }
  FFF_INLINE void load2_first(const uint16_t* p, int n, vec* a, vec* b) { load_bf16_first(p, n, a, b); }
  FFF_INLINE void store2(uint16_t* p, vec a, vec b) { store_bf16(p, a, b); }
  FFF_INLINE void stream2(uint16_t* p, vec a, vec b) { stream_bf16(p, a, b); }
  FFF_INLINE void store2_first(uint16_t* p, vec a, vec b, int n) { store_bf16_first(p, a, b, n); }
};

FFF_INLINE int64_t padded_width(int64_t width) { return (width + kPair - 1) / kPair * kPair; }

}  // namespace FFF_ISA
}  // namespace fff

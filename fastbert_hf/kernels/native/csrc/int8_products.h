// Products of rows of uint8 with packed int8 weights, for one instruction set: exact sums in int32. AVX-512 without
// VNNI takes those of AVX2.
//
// Pairs of products are never added in 16 bits: 2 * 255 * 127 does not fit.
#pragma once

namespace fff {
namespace FFF_ISA {

// Rows of the next tile: as equal as possible, so that no tile is much smaller than the others.
FFF_INLINE int64_t rows_of_tile(int64_t remaining, int64_t most) {
  return ceil_div(remaining, ceil_div(remaining, most));
}

#if defined(FFF_ISA_AVX512_VNNI)

// T rows of `a` with L blocks of b of `width` rows each (16 unless L is 1).
template <int T, int L>
static __attribute__((noinline)) void int8_tile(const uint8_t* const* a, int64_t groups, const int8_t* b, int width,
                                                const int8_t* next, int32_t* out, int64_t stride) {
  const __mmask16 lanes = (__mmask16)((1u << width) - 1u);
  const int64_t step = 4 * width, block = groups * step;
  __m512i sum[T][L];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sum[t][l] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i w[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const int8_t* from = b + l * block + g * step;
      w[l] = L > 1 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32(lanes, from);
      if (next) __builtin_prefetch(next + l * block + g * step, 0, 2);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int32_t four;
      memcpy(&four, a[t] + 4 * g, 4);
      const __m512i v = _mm512_set1_epi32(four);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) sum[t][l] = _mm512_dpbusd_epi32(sum[t][l], v, w[l]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) _mm512_storeu_si512(out + t * stride + l * kInt8Block, sum[t][l]);
}

constexpr int kInt8Rows = 8;

template <int L>
static void int8_rows(const Int8Product& p, int64_t first, int64_t size, int64_t row, const int8_t* next) {
  const uint8_t* const* a = p.a + first;
  const int8_t* b = p.b + row * p.groups * 4;
  int32_t* out = p.out + first * p.stride + row;
  const int width = (int)min64(kInt8Block, p.rows - row);
  switch (size) {
    case 8:
      return int8_tile<8, L>(a, p.groups, b, width, next, out, p.stride);
    case 7:
      return int8_tile<7, L>(a, p.groups, b, width, next, out, p.stride);
    case 6:
      return int8_tile<6, L>(a, p.groups, b, width, next, out, p.stride);
    case 5:
      return int8_tile<5, L>(a, p.groups, b, width, next, out, p.stride);
    case 4:
      return int8_tile<4, L>(a, p.groups, b, width, next, out, p.stride);
    case 3:
      return int8_tile<3, L>(a, p.groups, b, width, next, out, p.stride);
    case 2:
      return int8_tile<2, L>(a, p.groups, b, width, next, out, p.stride);
    default:
      return int8_tile<1, L>(a, p.groups, b, width, next, out, p.stride);
  }
}

static void int8_products(const Int8Product& p) {
  for (int64_t row = 0, blocks; row < p.rows; row += blocks * kInt8Block) {
    const int64_t whole = (p.rows - row) / kInt8Block;
    blocks = whole >= 3 ? 3 : max64(1, whole);
    for (int64_t first = 0, size; first < p.count; first += size) {
      size = rows_of_tile(p.count - first, kInt8Rows);
      const int8_t* next = first == 0 && p.next ? p.next + row * p.groups * 4 : nullptr;
      if (blocks == 3)
        int8_rows<3>(p, first, size, row, next);
      else if (blocks == 2)
        int8_rows<2>(p, first, size, row, next);
      else
        int8_rows<1>(p, first, size, row, next);
    }
  }
}

#elif defined(FFF_ISA_AVX512) || defined(FFF_ISA_AVX2)

// T rows of `a` with the first 8 rows or fewer of a block of b: both are widened to 16 bits.
template <int T>
static __attribute__((noinline)) void int8_tile(const uint8_t* const* a, int64_t groups, const int8_t* b, int width,
                                                int rows, const int8_t* next, int32_t* out, int64_t stride) {
  const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(rows), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i low[T], high[T];  // sums of rows 0 to 3 and of rows 4 to 7, two lanes each
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) low[t] = high[t] = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* from = b + g * 4 * width;
    const __m256i w =
        rows == 8 ? _mm256_loadu_si256((const __m256i*)from) : _mm256_maskload_epi32((const int*)from, lanes);
    const __m256i w0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(w));
    const __m256i w1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1));
    if (next) __builtin_prefetch(next + g * 4 * width, 0, 2);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int32_t four;
      memcpy(&four, a[t] + 4 * g, 4);
      const __m256i v = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
      low[t] = _mm256_add_epi32(low[t], _mm256_madd_epi16(w0, v));
      high[t] = _mm256_add_epi32(high[t], _mm256_madd_epi16(w1, v));
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const __m256i pairs = _mm256_hadd_epi32(low[t], high[t]);  // rows 0 1 4 5, 2 3 6 7
    _mm256_storeu_si256((__m256i*)(out + t * stride), _mm256_permute4x64_epi64(pairs, 0xd8));
  }
}

constexpr int kInt8Rows = 4;
constexpr const char* kInt8ProductsName = "avx2";

static void int8_products(const Int8Product& p) {
  for (int64_t row = 0; row < p.rows; row += 8) {
    const int64_t block = row / kInt8Block * kInt8Block, within = row - block;
    const int width = (int)min64(kInt8Block, p.rows - block), rows = (int)min64(8, p.rows - row);
    const int64_t offset = block * p.groups * 4 + within * 4;
    for (int64_t first = 0, size; first < p.count; first += size) {
      size = rows_of_tile(p.count - first, kInt8Rows);
      const int8_t* next = first == 0 && within == 0 && p.next ? p.next + offset : nullptr;
      const uint8_t* const* a = p.a + first;
      int32_t* out = p.out + first * p.stride + row;
      if (size == 4)
        int8_tile<4>(a, p.groups, p.b + offset, width, rows, next, out, p.stride);
      else if (size == 3)
        int8_tile<3>(a, p.groups, p.b + offset, width, rows, next, out, p.stride);
      else if (size == 2)
        int8_tile<2>(a, p.groups, p.b + offset, width, rows, next, out, p.stride);
      else
        int8_tile<1>(a, p.groups, p.b + offset, width, rows, next, out, p.stride);
    }
  }
}

#else

constexpr const char* kInt8ProductsName = "generic";

static void int8_products(const Int8Product& p) {
  for (int64_t row = 0; row < p.rows; row += kInt8Block) {
    const int64_t width = min64(kInt8Block, p.rows - row);
    for (int64_t t = 0; t < p.count; ++t) {
      const int8_t* from = p.b + row * p.groups * 4;
      int32_t sum[kInt8Block] = {0};
      if (width == kInt8Block) {  // a constant number of rows, for the compiler's vectors
        for (int64_t g = 0; g < p.groups; ++g, from += 4 * kInt8Block)
          for (int64_t r = 0; r < kInt8Block; ++r)
            for (int k = 0; k < 4; ++k) sum[r] += (int16_t)p.a[t][4 * g + k] * (int16_t)from[4 * r + k];
      } else {
        for (int64_t g = 0; g < p.groups; ++g, from += 4 * width)
          for (int64_t r = 0; r < width; ++r)
            for (int k = 0; k < 4; ++k) sum[r] += p.a[t][4 * g + k] * from[4 * r + k];
      }
      memcpy(p.out + t * p.stride + row, sum, sizeof sum);
    }
  }
}

#endif

}  // namespace FFF_ISA
}  // namespace fff

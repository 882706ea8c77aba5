// Rows between products with int8 weights: quantised, scaled, rounded. Loops that compilers turn into vectors; every
// element is computed alike wherever it falls, by operations that are each rounded once.
#pragma once

namespace fff {
namespace FFF_ISA {

// How a quantised row reads: value = scale * (q - zero).
struct RowScale {
  float scale;
  int32_t zero;
};

constexpr float kSmallestScale = 0x1p-120f;  // rows whose scale would be smaller count as zeros

// Integers in the order of the floats whose bits they come from; beyond those of +-Inf lie those of NaN.
FFF_INLINE int32_t ordered_bits(float a) {
  int32_t bits;
  memcpy(&bits, &a, 4);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
FFF_INLINE float from_ordered_bits(int32_t order) {
  const int32_t bits = order ^ (order >> 31 & 0x7fffffff);
  float a;
  memcpy(&a, &bits, 4);
  return a;
}

// The integer nearest to a, the even one of two, for |a| < 2^22.
FFF_INLINE int32_t nearest(float a) {
  const float shifted = a + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

// out[i] = q of in[i] for i < width, then zeros up to whole groups of 4. Zero is one of the values that q can stand
// for exactly. A row with NaN or Inf becomes zeros with a scale of NaN.
static RowScale quantize_row(const float* __restrict in, int64_t width, uint8_t* __restrict out) {
  int32_t lowest = 0, highest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int32_t order = ordered_bits(in[i]);
    lowest = order < lowest ? order : lowest;
    highest = order > highest ? order : highest;
  }
  const float low = from_ordered_bits(lowest), high = from_ordered_bits(highest);
  const float scale = (high - low) / 255.0f;
  for (int64_t i = width; i < padded_columns(width); ++i) out[i] = 0;
  if (!(scale < __builtin_inff()) || scale < kSmallestScale) {
    for (int64_t i = 0; i < width; ++i) out[i] = 0;
    return {scale < kSmallestScale ? 0.0f : __builtin_nanf(""), 0};
  }
  const float inverse = 1.0f / scale;
  const int32_t zero = nearest(-low * inverse);
  for (int64_t i = 0; i < width; ++i) {
    const int32_t q = nearest(in[i] * inverse) + zero;  // at least 0, as rounding keeps the order
    out[i] = (uint8_t)(q < 255 ? q : 255);
  }
  return {scale, zero};
}

// out[i] = in[i] * factors[i]
static void scale_row(const float* __restrict in, const float* __restrict factors, int64_t width,
                      float* __restrict out) {
  for (int64_t i = 0; i < width; ++i) out[i] = in[i] * factors[i];
}

// out[i] = (dots[i] - zero * sums[i]) * scales[i] * row.scale + bias[i]: what sums of products stand for.
static void dequantize_row(const int32_t* __restrict dots, RowScale row, const int32_t* __restrict sums,
                           const float* __restrict scales, const float* __restrict bias, int64_t count,
                           float* __restrict out) {
  if (bias)
    for (int64_t i = 0; i < count; ++i)
      out[i] = (float)(dots[i] - row.zero * sums[i]) * scales[i] * row.scale + bias[i];
  else
    for (int64_t i = 0; i < count; ++i) out[i] = (float)(dots[i] - row.zero * sums[i]) * scales[i] * row.scale;
}

// sum[i] = (first ? 0 : sum[i]) + c * values[i]
static void add_scaled(const float* __restrict values, float c, bool first, int64_t count, float* __restrict sum) {
  if (first)
    for (int64_t i = 0; i < count; ++i) sum[i] = c * values[i];
  else
    for (int64_t i = 0; i < count; ++i) sum[i] += c * values[i];
}

// Rows of x as floats in their own order, and sums back as elements of y.
template <class E>
static void widen_plain(const typename E::type* __restrict in, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = E::widen(in[i]);
}
FFF_INLINE uint16_t nearest_bf16(float a) {
  uint32_t word;
  memcpy(&word, &a, 4);
  return (uint16_t)(a != a ? 0x7fc0u : (word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}
template <class E>
static void narrow_plain(const float* __restrict in, int64_t count, typename E::type* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (E::kIsFloat)
      out[i] = in[i];
    else
      out[i] = nearest_bf16(in[i]);
  }
}

}  // namespace FFF_ISA
}  // namespace fff

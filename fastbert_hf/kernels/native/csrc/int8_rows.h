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

// Sixteen values, as many as a block of packed weights has rows; instruction sets of narrower vectors take several.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// Vectors are handed over by address: how functions return them depends on the instruction set.
template <class V, class T>
FFF_INLINE void load_block(const T* p, V* lanes) {
  memcpy(lanes, p, sizeof *lanes);
}
// the first n of them, then zeros; all zeros for null
template <class V, class T>
FFF_INLINE void load_block_first(const T* p, int64_t n, V* lanes) {
  if (p && n >= kInt8Block) return load_block(p, lanes);
  *lanes = V{};
  if (p) memcpy(lanes, p, n * sizeof(T));
}

// What turns sums of products into values, for the columns of one block.
struct BlockScales {
  Ints sums;
  Floats scales, bias;

  BlockScales(const int32_t* sum, const float* scale, const float* added, int64_t columns) {
    load_block_first(sum, columns, &sums);
    load_block_first(scale, columns, &scales);
    load_block_first(added, columns, &bias);
  }
};
// (dots - zero * sums) * scales * scale + bias
FFF_INLINE void block_values(const BlockScales& b, const int32_t* dots, const RowScale& row, Floats* values) {
  Ints exact;
  load_block(dots, &exact);
  exact -= row.zero * b.sums;
  *values = __builtin_convertvector(exact, Floats) * b.scales * row.scale + b.bias;
}

// Rows of x as floats in their own order.
template <class E>
static void widen_plain(const typename E::type* __restrict in, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = E::widen(in[i]);
}

// Sums back as elements of y: the first n of a block.
template <class V, class T>
FFF_INLINE void store_lanes(T* p, const V& lanes, int64_t n) {
  if (n >= kInt8Block)
    memcpy(p, &lanes, sizeof lanes);
  else
    memcpy(p, &lanes, n * sizeof(T));
}
FFF_INLINE void store_block(float* p, const Floats& a, int64_t n) { store_lanes(p, a, n); }
FFF_INLINE void store_block(uint16_t* p, const Floats& a, int64_t n) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
  Words words;
  memcpy(&words, &a, sizeof words);
  const Words rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;  // nearest even, as torch rounds
  const Words halves = a != a ? Words{} + 0x7fc0 : rounded;
  const Halves out = __builtin_convertvector(halves, Halves);
  store_lanes(p, out, n);
}
// a whole block past the caches
FFF_INLINE void stream_block(float* p, const Floats& a) {
  for (int64_t i = 0; i < kInt8Block; i += kWidth) {
    vec part;
    memcpy(&part, (const float*)&a + i, sizeof part);
    stream(p + i, part);
  }
}

}  // namespace FFF_ISA
}  // namespace fff

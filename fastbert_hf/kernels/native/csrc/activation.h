// The activations and their derivatives, in scalar code without branches that compilers turn into vectors.
//
// Products and sums are rounded separately (the build passes -ffp-contract=off), so an element's value does not
// depend on whether it falls into a vector or into the remainder of a loop. The formulas are those of ATen, so Inf
// and NaN come out alike. Polynomials: Chebyshev fits of ours; errors in float32 are about 1e-7 relative for exp and
// 1.6e-7 absolute for erf.
#pragma once

namespace fff {
namespace FFF_ISA {

enum Activation { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

FFF_INLINE float from_bits(uint32_t word) {
  float a;
  memcpy(&a, &word, 4);
  return a;
}
FFF_INLINE uint32_t to_bits(float a) {
  uint32_t word;
  memcpy(&word, &a, 4);
  return word;
}

FFF_INLINE float exponential(float a) {
  const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  float clamped = a > 88.0f ? 88.0f : (a < -87.0f ? -87.0f : a);
  float shifted = clamped * 1.44269504f + round_to_integer;
  float n = shifted - round_to_integer;
  float f = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 0.0013948590494692326f;
  p = p * f + 0.008375135250389576f;
  p = p * f + 0.041666217148303986f;
  p = p * f + 0.16666415333747864f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  float scale = from_bits((to_bits(shifted) + 127u) << 23);
  float result = p * scale;
  result = a > 88.7228f ? from_bits(0x7f800000u) : result;
  return a < -87.0f ? 0.0f : result;
}

FFF_INLINE float error_function(float a) {
  float t = from_bits(to_bits(a) & 0x7fffffffu);
  float s = a * a;
  float small = -9.673590284364764e-06f;  // erf(a) / a as a polynomial of a^2, for |a| <= 1
  small = small * s + 0.00011268253729213029f;
  small = small * s + -0.0008484396385028958f;
  small = small * s + 0.005221053492277861f;
  small = small * s + -0.026865437626838684f;
  small = small * s + 0.11283782869577408f;
  small = small * s + -0.37612637877464294f;
  small = small * s + 1.128379225730896f;
  small = small * a;
  float u = t > 4.0f ? 4.0f : t;           // erfc(4) is below the last bit of 1
  float large = -1.6140616025950294e-06f;  // -log(erfc(t)) as a polynomial of t, for 1 <= t <= 4
  large = large * u + 4.559062290354632e-05f;
  large = large * u + -0.0005927695310674608f;
  large = large * u + 0.004740222357213497f;
  large = large * u + -0.02636471763253212f;
  large = large * u + 0.10997824370861053f;
  large = large * u + 0.6319370865821838f;
  large = large * u + 1.1301666498184204f;
  large = large * u + -0.0003032129898201674f;
  large = 1.0f - exponential(-large);
  large = from_bits(to_bits(large) | (to_bits(a) & 0x80000000u));
  return t > 1.0f ? large : small;
}

FFF_INLINE float sigmoid(float a) { return 1.0f / (1.0f + exponential(-a)); }
FFF_INLINE float gelu(float a) { return a * 0.5f * (1.0f + error_function(a * 0.70710678f)); }
// tanh is written as a sigmoid: (1 + tanh(u)) / 2 = sigmoid(2u)
FFF_INLINE float gelu_tanh(float a) { return a * sigmoid(1.59576912f * (a + 0.044715f * a * a * a)); }
FFF_INLINE float relu(float a) { return a <= 0.0f ? 0.0f : a; }
FFF_INLINE float silu(float a) { return a * sigmoid(a); }

FFF_INLINE float gelu_derivative(float a) {
  float cdf = 0.5f * (1.0f + error_function(a * 0.70710678f));
  return cdf + a * (0.39894228f * exponential(-0.5f * a * a));
}
FFF_INLINE float gelu_tanh_derivative(float a) {
  float s = sigmoid(1.59576912f * (a + 0.044715f * a * a * a));
  return s + a * s * (1.0f - s) * (1.59576912f * (1.0f + 3.0f * 0.044715f * a * a));
}
FFF_INLINE float silu_derivative(float a) {
  float s = sigmoid(a);
  return s * (1.0f + a * (1.0f - s));
}

// out[i] = activation(in[i]); in place is allowed
static void activate(int activation, const float* in, float* out, int64_t count) {
  switch (activation) {
    case kGelu:
      for (int64_t i = 0; i < count; ++i) out[i] = gelu(in[i]);
      break;
    case kGeluTanh:
      for (int64_t i = 0; i < count; ++i) out[i] = gelu_tanh(in[i]);
      break;
    case kRelu:
      for (int64_t i = 0; i < count; ++i) out[i] = relu(in[i]);
      break;
    default:
      for (int64_t i = 0; i < count; ++i) out[i] = silu(in[i]);
  }
}

// gradient[i], the gradient of the activation, becomes the gradient of the logit
static void activate_backward(int activation, const float* logits, float* gradient, int64_t count) {
  switch (activation) {
    case kGelu:
      for (int64_t i = 0; i < count; ++i) gradient[i] *= gelu_derivative(logits[i]);
      break;
    case kGeluTanh:
      for (int64_t i = 0; i < count; ++i) gradient[i] *= gelu_tanh_derivative(logits[i]);
      break;
    case kRelu:
      for (int64_t i = 0; i < count; ++i) gradient[i] = logits[i] <= 0.0f ? 0.0f : gradient[i];
      break;
    default:
      for (int64_t i = 0; i < count; ++i) gradient[i] *= silu_derivative(logits[i]);
  }
}

}  // namespace FFF_ISA
}  // namespace fff

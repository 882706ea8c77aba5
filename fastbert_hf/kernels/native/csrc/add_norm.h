// A residual connection with the layer norm behind it: out = norm(x + y) * weight + bias, row by row. x and out are
// float32, y has elements of either type; out may be y itself.
#pragma once

namespace fff {
namespace FFF_ISA {

// The sum of sixteen lanes.
FFF_INLINE float sum_of(const float* lanes) {
  float half[8];
  for (int j = 0; j < 8; ++j) half[j] = lanes[j] + lanes[j + 8];
  for (int step = 4; step; step /= 2)
    for (int j = 0; j < step; ++j) half[j] += half[j + step];
  return half[0];
}

// out[i] = x[i] + y[i]; returns their mean. The order of sums is the same on every instruction set.
template <class E>
static float add_rows(const float* x, const typename E::type* y, int64_t width, float* out) {
  float lanes[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += out[i + j] = x[i + j] + E::widen(y[i + j]);
  for (int j = 0; i + j < width; ++j) lanes[j] += out[i + j] = x[i + j] + E::widen(y[i + j]);
  return sum_of(lanes) / (float)width;
}

static float mean_square(const float* row, float mean, int64_t width) {
  float lanes[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += (row[i + j] - mean) * (row[i + j] - mean);
  for (int j = 0; i + j < width; ++j) lanes[j] += (row[i + j] - mean) * (row[i + j] - mean);
  return sum_of(lanes) / (float)width;
}

template <class E>
static Status add_norm(const NormShape& s, const NormTensors& t) {
  const int64_t slice = max64(1, 16384 / s.width);
  auto task = [&](int64_t i, int) {
    for (int64_t row = i * slice; row < min64(s.num_rows, (i + 1) * slice); ++row) {
      float* out = t.out + row * s.width;
      const float mean = add_rows<E>(t.x + row * s.width, (const typename E::type*)t.y + row * s.width, s.width, out);
      const float factor = 1.0f / __builtin_sqrtf(mean_square(out, mean, s.width) + s.epsilon);
      for (int64_t k = 0; k < s.width; ++k) out[k] = (out[k] - mean) * factor * t.weight[k] + t.bias[k];
    }
  };
  parallel(s.threads, ceil_div(s.num_rows, slice), task);
  return kDone;
}

}  // namespace FFF_ISA
}  // namespace fff

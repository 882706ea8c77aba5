// The paper's Level 1 and Level 2 forms of a dense and of a fast feedforward layer, one tree, GELU, float32.
// Level 1 works on one token at a time with vector operations (dot product, axpy); Level 2 does the same vector
// operations batched over tokens, so that a parameter row is read once for all of them (dense) or a whole level at a
// time (trees). Compiled by the benchmark for the machine it runs on; never part of the kernels.
//
// x (N, H), weight_in (n, H), bias_in (n), weight_out (n, H), y (N, H), all row-major.
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

float dot(const float* a, const float* b, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

void axpy(float scale, const float* a, float* y, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) y[i] += scale * a[i];
}

float gelu(float logit) { return 0.5f * logit * (1 + std::erf(logit * 0.70710678f)); }

void clear(float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = 0;
}

}  // namespace

extern "C" void dense_level1(const float* x, const float* weight_in, const float* bias_in, const float* weight_out,
                             float* y, int64_t rows, int64_t width, int64_t neurons) {
  clear(y, rows * width);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t node = 0; node < neurons; ++node) {
      const float logit = dot(x + row * width, weight_in + node * width, width) + bias_in[node];
      axpy(gelu(logit), weight_out + node * width, y + row * width, width);
    }
}

extern "C" void dense_level2(const float* x, const float* weight_in, const float* bias_in, const float* weight_out,
                             float* y, int64_t rows, int64_t width, int64_t neurons) {
  std::vector<float> hidden(rows);
  clear(y, rows * width);
  for (int64_t node = 0; node < neurons; ++node) {
    for (int64_t row = 0; row < rows; ++row)
      hidden[row] = dot(x + row * width, weight_in + node * width, width) + bias_in[node];
    for (int64_t row = 0; row < rows; ++row) hidden[row] = gelu(hidden[row]);
    for (int64_t row = 0; row < rows; ++row) axpy(hidden[row], weight_out + node * width, y + row * width, width);
  }
}

extern "C" void fff_level1(const float* x, const float* weight_in, const float* bias_in, const float* weight_out,
                           float* y, int64_t rows, int64_t width, int64_t neurons) {
  clear(y, rows * width);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t node = 0; node < neurons;) {
      const float logit = dot(x + row * width, weight_in + node * width, width) + bias_in[node];
      axpy(gelu(logit), weight_out + node * width, y + row * width, width);
      node = 2 * node + (logit > 0 ? 2 : 1);
    }
}

extern "C" void fff_level2(const float* x, const float* weight_in, const float* bias_in, const float* weight_out,
                           float* y, int64_t rows, int64_t width, int64_t neurons) {
  std::vector<float> logits(rows);
  std::vector<int64_t> nodes(rows, 0);
  clear(y, rows * width);
  for (int64_t first = 0; first < neurons; first = 2 * first + 1) {
    for (int64_t row = 0; row < rows; ++row)
      logits[row] = dot(x + row * width, weight_in + nodes[row] * width, width) + bias_in[nodes[row]];
    for (int64_t row = 0; row < rows; ++row)
      axpy(gelu(logits[row]), weight_out + nodes[row] * width, y + row * width, width);
    for (int64_t row = 0; row < rows; ++row) nodes[row] = 2 * nodes[row] + (logits[row] > 0 ? 2 : 1);
  }
}

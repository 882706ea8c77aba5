// Trees with int8 weights, for inference: the problem's description and the packed layout of the weights. Part of
// common.h.
//
// A matrix of R rows and K columns is packed in blocks of 16 rows, the last one narrower where 16 does not divide R.
// A block of b rows holds, for every group of 4 columns, the 4 values of its first row, then those of its second, and
// so on: [ceil(K / 4)][b][4]. Missing columns are zeros. A leaf's W_in is packed as it is (w, H), its W_out
// transposed (H_out, w), so that both are summed along groups of 4.
//
// Rows of activations are uint8: a row v becomes q with v = scale * (q - zero). Sums of products are exact in int32
// for K <= kMaxInt8Width, so they do not depend on the instruction set or on any order.
#pragma once

#include <stdint.h>

// whether the compiler knows vpdpbusd on 512 bits: GCC 8, clang 6
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512vnniintrin.h>)
#define FFF_HAS_AVX512_VNNI
#endif
#endif

namespace fff {

constexpr int64_t kInt8Block = 16;        // rows of a block
constexpr int64_t kMaxInt8Width = 66311;  // 255 * 127 * width < 2^31
constexpr int64_t kInt8Panel = 48;        // rows of packed weights that are multiplied at once, whole blocks

static inline int64_t padded_columns(int64_t width) { return (width + 3) / 4 * 4; }
static inline int64_t padded_rows(int64_t rows) { return (rows + kInt8Block - 1) / kInt8Block * kInt8Block; }

// Shapes beside those of LeafShape: input_scale (H), weight_in (P*m, w * padded H), scale_in, sum_in and bias_in
// (P*m*w), weight_out (P*m, H_out * padded w), scale_out, sum_out and bias_out (P*m, H_out), leaves and margins (N,
// P).
struct Int8LeafTensors {
  const void* x;
  const float *router, *threshold, *input_scale;
  const int8_t* weight_in;
  const float* scale_in;
  const int32_t* sum_in;
  const float* bias_in;  // or null
  const int8_t* weight_out;
  const float* scale_out;
  const int32_t* sum_out;
  const float* bias_out;  // or null
  void* y;
  int32_t* leaves;  // both or neither
  float* margins;
};

// Trees of single neurons. Shapes beside those of Shape: weight_in (P*n, H), bias_in (P*n), weight_out (P*n, H_out)
// in rows as they are, scale_out (P*n), output_scale (H_out), visited (N, P, D+1).
struct Int8Tensors {
  const void* x;
  const float *weight_in, *bias_in;  // bias_in or null
  const int8_t* weight_out;
  const float *scale_out, *output_scale;
  void* y;
  int32_t* visited;  // or null
};

// A linear layer. Shapes: weight (H_out, H) packed, scale, sum and bias (H_out); x (N, H), y (N, H_out).
struct LinearShape {
  int64_t num_rows, in_width, out_width;
  int threads;
};

struct Int8Linear {
  const int8_t* weight;
  const float* scale;
  const int32_t* sum;
  const float* bias;  // or null

  bool missing() const { return !weight || !scale || !sum; }
};

struct Int8LinearTensors {
  const void* x;
  Int8Linear layer;
  void* y;
};

// Self-attention between two linear layers. Shapes: x and y (B, T, H), visible (B, T) bytes or null; `in` is (3 H,
// H), `out` (H, H).
struct Int8AttentionTensors {
  const void* x;
  const uint8_t* visible;
  Int8Linear in, out;
  void* y;
};

// out[t * stride + r] = sum over k of a[t][k] * b[r][k] for t < count and r < rows. Rows of `a` have 4 * groups
// values, b is packed from its first row on, and rows of `out` have room for whole blocks.
struct Int8Product {
  const uint8_t* const* a;
  int64_t count, groups;
  const int8_t* b;
  int64_t rows;
  int32_t* out;
  int64_t stride;
  const int8_t* next;  // what is read after b, to be fetched ahead, or null
};
typedef void (*Int8Products)(const Int8Product&);

// One instruction set's kernels, one entry per element type of x and y: float32, bfloat16.
struct Int8Kernels {
  const char* products_name;
  Int8Products products;
  Status (*forward[2])(const Shape&, const Int8Tensors&);
  Status (*leaf_forward[2])(const LeafShape&, const Int8LeafTensors&, Int8Products);
  Status (*linear[2])(const LinearShape&, const Int8LinearTensors&, Int8Products);
  Status (*attention[2])(const AttentionShape&, const Int8AttentionTensors&, Int8Products);
};

}  // namespace fff

// What every instruction set shares: the problem's description, parallel loops, scratch memory, sorting by leaf.
#pragma once

#include <stdint.h>
#include <stdlib.h>

// whether the compiler knows vdpbf16ps: GCC 10, clang 9
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)
#define FFF_HAS_AVX512_BF16
#endif
#endif

namespace fff {

// Shapes: x (N, H), weight_in (P*n, H), bias_in (P*n) or null, weight_out (P*n, H_out), y (N, H_out),
// visited and logits (N, P, D+1). Rows of everything are contiguous.
struct Shape {
  int64_t num_rows, in_width, out_width, trees;
  int depth, activation, threads;

  int64_t levels() const { return depth + 1; }
  int64_t nodes() const { return ((int64_t)2 << depth) - 1; }
  int64_t visits() const { return trees * levels(); }  // a row's visited nodes
};

struct ForwardTensors {
  const void *x, *weight_in, *bias_in, *weight_out;
  void* y;
  int32_t* visited;  // both or neither
  float* logits;
};

struct BackwardTensors {
  const void *grad_y, *x, *weight_in, *weight_out;
  const int32_t* visited;
  const float* logits;
  void *grad_x, *grad_weight_in, *grad_bias_in, *grad_weight_out;  // null where not wanted
};

// Leaf trees. Shapes: x (N, H), router (P*r, H) and threshold (P*r) with r = 2^D - 1, weight_in (P*m*w, H) with
// m = 2^D leaves of w neurons, bias_in (P*m*w) or null, weight_out (P*m*w, H_out), bias_out (P*m, H_out) or null,
// y (N, H_out), leaves, deciders and margins (N, P), logits (N, P, w). Rows of everything are contiguous.
struct LeafShape {
  int64_t num_rows, in_width, out_width, trees, leaf_width;
  int depth, activation, threads;

  int64_t leaves() const { return (int64_t)1 << depth; }
  int64_t routers() const { return leaves() - 1; }
  // The routers of a tree of leaves are a tree of single neurons, one level shallower.
  Shape router_shape() const { return {num_rows, in_width, 0, trees, depth - 1, 0, threads}; }
};

struct LeafForwardTensors {
  const void *x, *router, *threshold, *weight_in, *bias_in, *weight_out, *bias_out;
  void* y;
  int32_t *leaves, *deciders;  // these four all or none
  float *margins, *logits;
};

struct LeafBackwardTensors {
  const void *grad_y, *x, *router, *weight_in, *weight_out, *bias_out;
  const int32_t *leaves, *deciders;
  const float *margins, *logits;
  void *grad_x, *grad_router, *grad_threshold, *grad_weight_in, *grad_bias_in, *grad_weight_out,
      *grad_bias_out;  // null where not wanted
};

// Self-attention. Shapes: query_key_value (B, T, 3, heads, head_dim), visible (B, T) bytes or null, y (B, T, heads,
// head_dim).
struct AttentionShape {
  int64_t texts, tokens, heads, head_dim;
  float scale;
  int threads;

  int64_t products() const { return 2 * texts * heads * tokens * tokens * head_dim; }
};

struct AttentionTensors {
  const void* query_key_value;
  const uint8_t* visible;
  void* y;
};

// A residual connection and a layer norm. Shapes: x, y and out (N, H), weight and bias (H). out may be y.
struct NormShape {
  int64_t num_rows, width;
  float epsilon;
  int threads;
};

struct NormTensors {
  const float* x;
  const void* y;
  const float *weight, *bias;
  float* out;
};

enum Status { kDone = 0, kNoMemory = 1, kBadPath = 2, kBadArgument = 3, kNoData = 4 };

}  // namespace fff

#include "int8_common.h"

namespace fff {

// One entry per element type: float32, bfloat16.
struct Kernels {
  const char* name;
  Status (*forward[2])(const Shape&, const ForwardTensors&);
  Status (*backward[2])(const Shape&, const BackwardTensors&);
  Status (*leaf_forward[2])(const LeafShape&, const LeafForwardTensors&);
  Status (*leaf_backward[2])(const LeafShape&, const LeafBackwardTensors&);
  Int8Kernels int8;
  Status (*attention[2])(const AttentionShape&, const AttentionTensors&);
  Status (*add_norm[2])(const NormShape&, const NormTensors&);  // by the element type of y
};

// Calls task(context, index, worker) for every index below `count`, on up to `threads` threads of torch's OpenMP
// runtime; `worker` is below `threads`. Which worker gets which index varies, so results must not depend on it.
void run_tasks(int threads, int64_t count, void (*task)(void*, int64_t, int), void* context);

// Uninitialised scratch memory, aligned to a cache line; null when memory is short.
void* allocate(int64_t bytes);

template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data((T*)allocate(count * (int64_t)sizeof(T))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool missing() const { return data == nullptr; }
};

// Sorts `rows` by keys[row * stride], which are below 2^key_bits, equal keys keeping their order. `spare` has the
// same size.
void sort_by_key(int32_t* rows, int32_t* spare, int64_t count, const uint32_t* keys, int64_t stride, int key_bits);

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Leaves are numbered 0 .. 2^depth - 1 from left to right. The visited node of a level, numbered inside its tree:
static inline int64_t node_on_path(uint32_t leaf, int depth, int64_t level) {
  return ((int64_t)1 << level) - 1 + (leaf >> (depth - level));
}

// First level at which the paths to two different leaves differ.
static inline int first_difference(uint32_t leaf, uint32_t other, int depth) {
  return depth - (31 - __builtin_clz(leaf ^ other));
}

}  // namespace fff

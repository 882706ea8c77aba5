// The forward pass of trees of single neurons with int8 output weights: the walk of float32, then sums along paths.
//
//   y = output_scale * sum over visits of (activation(logit) * scale_out[node]) * q[node]
//
// A sum takes the visits in their order, so that it has the same bits however rows are grouped.
#pragma once

namespace fff {
namespace FFF_ISA {

#if defined(FFF_ISA_AVX512)
constexpr int kInt8SumRows = 4, kInt8SumBlocks = 4;  // of a tile: its sums stay in registers
#elif defined(FFF_ISA_AVX2)
constexpr int kInt8SumRows = 2, kInt8SumBlocks = 2;
#else
constexpr int kInt8SumRows = 2, kInt8SumBlocks = 1;
#endif
constexpr int kParts = (int)kInt8Block / kWidth;  // vectors of a block

// 16 values as floats: compilers widen them one by one
FFF_INLINE void widen_block(const int8_t* p, vec* out) {
#if defined(FFF_ISA_AVX512)
  out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(FFF_ISA_AVX2)
  for (int i = 0; i < kParts; ++i)
    out[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + i * kWidth))));
#else
  for (int i = 0; i < kParts; ++i)
    out[i] = vec{(float)p[4 * i], (float)p[4 * i + 1], (float)p[4 * i + 2], (float)p[4 * i + 3]};
#endif
}

// Sums of rows that visit the same nodes.
template <class E>
struct Int8PathSum {
  const int8_t* const* weights;  // of the visited nodes
  int64_t visits, width;
  const float* output_scale;
  const float* coefficients[kInt8SumRows];
  typename E::type* y[kInt8SumRows];
  bool streams;
};

// columns [column, column + 16 C) of T rows, or the first n of them when C = 1
template <class E, int T, int C, bool PARTIAL>
FFF_INLINE void int8_sum_tile(const Int8PathSum<E>& p, int64_t column, int64_t n) {
  vec sum[T][C * kParts];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int c = 0; c < C * kParts; ++c) sum[t][c] = zero();
  for (int64_t k = 0; k < p.visits; ++k) {
    const int8_t* row = p.weights[k] + column;
    int8_t last[kInt8Block] = {0};
    if (PARTIAL) memcpy(last, row, n);
    vec w[C * kParts];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) widen_block(PARTIAL ? last : row + c * kInt8Block, w + c * kParts);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const vec scale = broadcast(p.coefficients[t][k]);
#pragma GCC unroll 16
      for (int c = 0; c < C * kParts; ++c) sum[t][c] = fma(scale, w[c], sum[t][c]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    const int64_t place = column + c * kInt8Block;
    Floats scale;
    load_block_first(p.output_scale + place, n, &scale);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      Floats block;
      memcpy(&block, &sum[t][c * kParts], sizeof block);
      block *= scale;
      if (E::kIsFloat && p.streams)
        stream_block((float*)p.y[t] + place, block);
      else
        store_block(p.y[t] + place, block, n);
    }
  }
}

template <class E, int T>
static __attribute__((noinline)) void int8_sum_rows(const Int8PathSum<E>& p) {
  int64_t column = 0;
  for (; column + kInt8SumBlocks * kInt8Block <= p.width; column += kInt8SumBlocks * kInt8Block)
    int8_sum_tile<E, T, kInt8SumBlocks, false>(p, column, kInt8Block);
  for (; column + kInt8Block <= p.width; column += kInt8Block) int8_sum_tile<E, T, 1, false>(p, column, kInt8Block);
  if (column < p.width) int8_sum_tile<E, T, 1, true>(p, column, p.width - column);
}

// Every row's path and coefficients.
template <class E>
struct Int8Paths {
  const Shape* shape;
  const Int8Tensors* tensors;
  const float* coefficients;  // (N, P * levels)
  const uint32_t* leaves;     // (N, P)
  bool streams;

  // With one tree, rows at the same leaf visit the same nodes; with depth 0 all rows do.
  bool shared() const { return shape->trees == 1 || shape->depth == 0; }
  bool same_path(int64_t a, int64_t b) const { return shape->depth == 0 || leaves[a] == leaves[b]; }

  const int8_t* weights_of(int64_t row, int64_t tree, int64_t level) const {
    const int64_t node = node_on_path(leaves[row * shape->trees + tree], shape->depth, level);
    return tensors->weight_out + (tree * shape->nodes() + node) * shape->out_width;
  }
  void fill(int64_t row, const int8_t** weights) const {
    for (int64_t tree = 0; tree < shape->trees; ++tree)
      for (int64_t level = 0; level < shape->levels(); ++level)
        weights[tree * shape->levels() + level] = weights_of(row, tree, level);
  }
  // asks for what the path of `row` has and that of `before` has not
  void fetch(int64_t row, int64_t before) const {
    for (int64_t tree = 0; tree < shape->trees; ++tree) {
      const uint32_t leaf = leaves[row * shape->trees + tree], other = leaves[before * shape->trees + tree];
      if (leaf == other) continue;
      for (int64_t level = first_difference(leaf, other, shape->depth); level < shape->levels(); ++level)
        prefetch_row(weights_of(row, tree, level), shape->out_width);
    }
  }
};

// Rows of one task, those with one path beside each other.
template <class E>
static void int8_sum_task(const Int8Paths<E>& paths, const int32_t* rows, int64_t count, const int8_t** weights) {
  const Shape& s = *paths.shape;
  const int64_t visits = s.visits();
  Int8PathSum<E> p = {};
  p.weights = weights;
  p.visits = visits;
  p.width = s.out_width;
  p.output_scale = paths.tensors->output_scale;
  p.streams = paths.streams;
  int64_t filled = -1;  // the row whose path `weights` holds
  for (int64_t i = 0; i < count;) {
    int size = 1;
    while (paths.shared() && size < kInt8SumRows && i + size < count && paths.same_path(rows[i], rows[i + size]))
      ++size;
    for (int t = 0; t < size; ++t) {
      p.coefficients[t] = paths.coefficients + rows[i + t] * visits;
      p.y[t] = (typename E::type*)paths.tensors->y + rows[i + t] * s.out_width;
    }
    if (i + size < count) paths.fetch(rows[i + size], rows[i]);
    if (filled < 0 || !paths.shared() || !paths.same_path(filled, rows[i])) paths.fill(rows[i], weights);
    filled = rows[i];
    switch (size) {
#if defined(FFF_ISA_AVX512)
      case 4:
        int8_sum_rows<E, 4>(p);
        break;
      case 3:
        int8_sum_rows<E, 3>(p);
        break;
#endif
      case 2:
        int8_sum_rows<E, 2>(p);
        break;
      default:
        int8_sum_rows<E, 1>(p);
    }
    i += size;
  }
  if (paths.streams) finish_streams();
}

template <class E>
static Status int8_sum_paths(const Int8Paths<E>& paths) {
  const Shape& s = *paths.shape;
  const int64_t slice = min64(128, max64(4, ceil_div(s.num_rows, 4 * s.threads)));
  Scratch<int32_t> rows(s.num_rows), spare(s.num_rows);
  Scratch<const int8_t*> weights(s.threads * s.visits());
  if (rows.missing() || spare.missing() || weights.missing()) return kNoMemory;
  for (int64_t i = 0; i < s.num_rows; ++i) rows.data[i] = (int32_t)i;
  if (s.trees == 1) sort_by_key(rows.data, spare.data, s.num_rows, paths.leaves, 1, s.depth);
  auto task = [&](int64_t i, int worker) {
    int8_sum_task(paths, rows.data + i * slice, min64(slice, s.num_rows - i * slice),
                  weights.data + worker * s.visits());
  };
  parallel(s.threads, ceil_div(s.num_rows, slice), task);
  return kDone;
}

// A few rows, one after the other, as forward_few: what a row needs next is on its way before it is known.
template <class E>
static Status int8_forward_few(const Shape& s, const Int8Tensors& tensors) {
  const int64_t visits = s.visits(), in_bytes = s.in_width * (int64_t)sizeof(float);
  Scratch<float> logits(visits), scales(visits), wide_x(E::kIsFloat ? 1 : max64(1, s.in_width));
  Scratch<const int8_t*> weights(visits);
  if (logits.missing() || scales.missing() || wide_x.missing() || weights.missing()) return kNoMemory;
  for (int64_t i = 0; i < s.num_rows; ++i) {
    const typename E::type* row = (const typename E::type*)tensors.x + i * s.in_width;
    if (!E::kIsFloat) widen_plain<E>(row, s.in_width, wide_x.data);
    const float* x = E::kIsFloat ? (const float*)row : wide_x.data;
    uint32_t leaf = 0;
    for (int64_t visit = 0; visit < visits; ++visit) {
      const int64_t tree = visit / s.levels(), level = visit % s.levels(), first = tree * s.nodes();
      if (level == 0) leaf = 0;
      const int64_t node = first + ((int64_t)1 << level) - 1 + leaf;
      weights.data[visit] = tensors.weight_out + node * s.out_width;
      const int64_t first_child = first + ((int64_t)2 << level) - 1 + 2 * (int64_t)leaf;
      if (level < s.depth) prefetch_row(tensors.weight_in + first_child * s.in_width, 2 * in_bytes);
      float logit;
      dot_tile<F32, 1>(tensors.weight_in + node * s.in_width, &x, s.in_width, &logit);
      if (tensors.bias_in) logit += tensors.bias_in[node];
      logits.data[visit] = logit;
      scales.data[visit] = tensors.scale_out[node];
      prefetch_row(weights.data[visit], s.out_width);
      if (level < s.depth)
        leaf = 2 * leaf + (logit > 0.0f);
      else if (tensors.visited)
        write_path(leaf, s.depth, tensors.visited + i * visits + tree * s.levels());
    }
    activate(s.activation, logits.data, logits.data, visits);
    for (int64_t visit = 0; visit < visits; ++visit) logits.data[visit] *= scales.data[visit];
    Int8PathSum<E> p = {};
    p.weights = weights.data;
    p.visits = visits;
    p.width = s.out_width;
    p.output_scale = tensors.output_scale;
    p.coefficients[0] = logits.data;
    p.y[0] = (typename E::type*)tensors.y + i * s.out_width;
    int8_sum_rows<E, 1>(p);
  }
  return kDone;
}

template <class E>
static Status int8_forward_chunk(const Shape& s, const Int8Tensors& tensors) {
  const int64_t visits = s.visits(), values = E::kIsFloat ? 0 : s.num_rows * s.in_width;
  Scratch<float> coefficients(s.num_rows * visits), wide_x(max64(1, values));
  Scratch<uint32_t> leaves(s.num_rows * s.trees);
  if (coefficients.missing() || wide_x.missing() || leaves.missing()) return kNoMemory;
  if (!E::kIsFloat) widen_plain<E>((const typename E::type*)tensors.x, values, wide_x.data);
  const float* x = E::kIsFloat ? (const float*)tensors.x : wide_x.data;
  const Walk<F32> w = {&s, x, tensors.weight_in, tensors.bias_in, coefficients.data, leaves.data};
  const Status status = walk(w);
  if (status != kDone) return status;
  const int64_t slice = 256;
  auto activate_slice = [&](int64_t i, int) {
    const int64_t begin = i * slice, end = min64(s.num_rows, begin + slice);
    float* of_slice = coefficients.data + begin * visits;
    activate(s.activation, of_slice, of_slice, (end - begin) * visits);
    for (int64_t path = begin * s.trees; path < end * s.trees; ++path) {
      const uint32_t leaf = leaves.data[path];
      for (int64_t level = 0; level < s.levels(); ++level)
        coefficients.data[path * s.levels() + level] *=
            tensors.scale_out[path % s.trees * s.nodes() + node_on_path(leaf, s.depth, level)];
      if (tensors.visited) write_path(leaf, s.depth, tensors.visited + path * s.levels());
    }
  };
  parallel(s.threads, ceil_div(s.num_rows, slice), activate_slice);
  const bool streams = E::kIsFloat && s.out_width % kInt8Block == 0 &&
                       should_stream(tensors.y, s.num_rows, s.out_width * (int64_t)sizeof(float));
  const Int8Paths<E> paths = {&s, &tensors, coefficients.data, leaves.data, streams};
  return int8_sum_paths(paths);
}

template <class E>
static Status int8_forward(const Shape& s, const Int8Tensors& tensors) {
  if (s.num_rows <= 2) return int8_forward_few<E>(s, tensors);
  const int64_t visits = s.visits(), bytes_per_row = 4 * (visits + 4 * s.trees + (E::kIsFloat ? 0 : s.in_width));
  auto advance = [&](Int8Tensors* slice, int64_t begin) {
    if (slice->visited) slice->visited += begin * visits;
  };
  return by_chunks<E>(s, tensors, bytes_per_row, kBlock, advance, int8_forward_chunk<E>);
}

}  // namespace FFF_ISA
}  // namespace fff

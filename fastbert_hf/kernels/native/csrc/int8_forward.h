// The forward pass of trees of single neurons with int8 output weights: the walk of float32, then sums along paths.
//
//   y = output_scale * sum over visits of (activation(logit) * scale_out[node]) * q[node]
//
// A sum takes the visits in their order, products and sums rounded separately, so that it has the same bits however
// rows are grouped.
#pragma once

namespace fff {
namespace FFF_ISA {

#if defined(FFF_ISA_AVX512)
constexpr int kInt8SumRows = 4, kInt8SumBlocks = 4;  // of a tile: its sums stay in registers
#else
constexpr int kInt8SumRows = 2, kInt8SumBlocks = 1;
#endif

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
template <class E, int T, int C>
FFF_INLINE void int8_sum_tile(const Int8PathSum<E>& p, int64_t column, int64_t n) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  Floats sum[T][C] = {};
  for (int64_t k = 0; k < p.visits; ++k) {
    Floats w[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      Bytes bytes = {};
      memcpy(&bytes, p.weights[k] + column + c * kInt8Block, C > 1 || n >= kInt8Block ? sizeof bytes : (size_t)n);
      w[c] = __builtin_convertvector(bytes, Floats);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[t][c] += p.coefficients[t][k] * w[c];
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    const int64_t place = column + c * kInt8Block, lanes = C > 1 ? kInt8Block : n;
    Floats scale;
    load_block_first(p.output_scale + place, lanes, &scale);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      sum[t][c] *= scale;
      if (E::kIsFloat && p.streams)
        stream_block((float*)p.y[t] + place, sum[t][c]);
      else
        store_block(p.y[t] + place, sum[t][c], lanes);
    }
  }
}

template <class E, int T>
static __attribute__((noinline)) void int8_sum_rows(const Int8PathSum<E>& p) {
  int64_t column = 0;
  for (; column + kInt8SumBlocks * kInt8Block <= p.width; column += kInt8SumBlocks * kInt8Block)
    int8_sum_tile<E, T, kInt8SumBlocks>(p, column, kInt8SumBlocks * kInt8Block);
  for (; column < p.width; column += kInt8Block)
    int8_sum_tile<E, T, 1>(p, column, min64(kInt8Block, p.width - column));
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

  void fill(int64_t row, const int8_t** weights) const {
    const Shape& s = *shape;
    for (int64_t tree = 0; tree < s.trees; ++tree)
      for (int64_t level = 0; level < s.levels(); ++level) {
        const int64_t node = node_on_path(leaves[row * s.trees + tree], s.depth, level);
        weights[tree * s.levels() + level] = tensors->weight_out + (tree * s.nodes() + node) * s.out_width;
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
  typedef typename E::type T;
  const int64_t visits = s.visits(), bytes_per_row = 4 * (visits + 4 * s.trees + (E::kIsFloat ? 0 : s.in_width));
  const int64_t chunk = max64(4 * kBlock, kChunkBytes / bytes_per_row);
  for (int64_t begin = 0; begin < s.num_rows; begin += chunk) {
    Shape part = s;
    part.num_rows = min64(chunk, s.num_rows - begin);
    Int8Tensors slice = tensors;
    slice.x = (const T*)tensors.x + begin * s.in_width;
    slice.y = (T*)tensors.y + begin * s.out_width;
    if (tensors.visited) slice.visited += begin * visits;
    const Status status = int8_forward_chunk<E>(part, slice);
    if (status != kDone) return status;
  }
  return kDone;
}

}  // namespace FFF_ISA
}  // namespace fff

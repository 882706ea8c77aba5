// The forward pass of leaf trees with int8 weights.
//
// Routes are those of float32. Then every row of x is quantised once, and every leaf computes for the rows that chose
// it, with Q for quantised rows,
//
//   y += c * (Q(activation(Q(x * input_scale) W_in[leaf]^T + b_in[leaf])) W_out[leaf] + b_out[leaf])
//
// Sums of products are integers; what lies between is float32, element by element. So no result depends on how rows,
// blocks or threads divide the work.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int64_t kInt8Ahead = 24 << 10;  // bytes of weights that are fetched ahead

// One leaf's parameters.
struct Int8Leaf {
  const int8_t *weight_in, *weight_out;
  const float *scale_in, *bias_in, *scale_out, *bias_out;
  const int32_t *sum_in, *sum_out;
};

// A chunk's rows, routed and quantised.
struct Int8Chunk {
  const LeafShape* shape;
  const Int8LeafTensors* tensors;
  Int8Products products;
  const Route* routes;     // (N, P)
  const uint8_t* q;        // (N, padded H)
  const RowScale* scales;  // (N)

  int64_t in_bytes() const { return shape->leaf_width * padded_columns(shape->in_width); }
  int64_t out_bytes() const { return shape->out_width * padded_columns(shape->leaf_width); }

  Int8Leaf leaf(int64_t tree, int64_t number) const {
    const LeafShape& s = *shape;
    const Int8LeafTensors& t = *tensors;
    const int64_t leaf = tree * s.leaves() + number, neuron = leaf * s.leaf_width, column = leaf * s.out_width;
    return {t.weight_in + leaf * in_bytes(),
            t.weight_out + leaf * out_bytes(),
            t.scale_in + neuron,
            t.bias_in ? t.bias_in + neuron : nullptr,
            t.scale_out + column,
            t.bias_out ? t.bias_out + column : nullptr,
            t.sum_in + neuron,
            t.sum_out + column};
  }
};

// The weights that come kInt8Ahead bytes after byte `offset` of `now`, of which there are `bytes`, or null.
FFF_INLINE const int8_t* ahead(const int8_t* now, int64_t bytes, int64_t offset, const int8_t* then) {
  const int64_t target = offset + kInt8Ahead;
  if (target < bytes) return now + target;
  return then ? then + (target - bytes) : nullptr;
}

// Neurons [begin, end) of one leaf for `count` rows, begin a multiple of 16: hidden[i * stride + k] = activation.
// Rows of `hidden` have room for whole blocks.
static void int8_hidden(const Int8Chunk& chunk, const Int8Leaf& leaf, const uint8_t* const* q, const RowScale* scales,
                        int64_t count, int64_t begin, int64_t end, int32_t* dots, float* hidden, int64_t stride) {
  const LeafShape& s = *chunk.shape;
  const int64_t columns = padded_columns(s.in_width);
  for (int64_t row = begin; row < end; row += kInt8Panel) {
    const int64_t rows = min64(kInt8Panel, end - row);
    const int8_t* next = ahead(leaf.weight_in, chunk.in_bytes(), row * columns, leaf.weight_out);
    chunk.products({q, count, columns / 4, leaf.weight_in + row * columns, rows, dots, kInt8Panel, next});
    for (int64_t column = row; column < row + rows; column += kInt8Block) {
      const BlockScales block(leaf.sum_in + column, leaf.scale_in + column,
                              leaf.bias_in ? leaf.bias_in + column : nullptr, row + rows - column);
      for (int64_t i = 0; i < count; ++i) {
        Floats values;
        block_values(block, dots + i * kInt8Panel + column - row, scales[i], &values);
        store_block(hidden + i * stride + column, values, kInt8Block);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i)
    activate(s.activation, hidden + i * stride + begin, hidden + i * stride + begin, end - begin);
}

// Where the sums of rows of y wait: in y itself, or where its elements are narrower than float in rows of floats.
template <class E>
struct Int8Output {
  typename E::type* y;  // (N, H_out)
  float* wide;          // (N, H_out) between trees, or null
  bool first, last, streams;

  // adds values of the first n columns of a block
  FFF_INLINE void add(const Int8Output& o, int64_t place, const Floats& values, int64_t n) {
    float* sums = E::kIsFloat ? (float*)o.y : o.wide;
    Floats sum = {};
    if (!o.first) load_block_first(sums + place, n, &sum);
    sum += values;
    if (!o.last)
      store_block(sums + place, sum, n);
    else if (E::kIsFloat && o.streams)
      stream_block((float*)o.y + place, sum);
    else
      store_block(o.y + place, sum, n);
  }
  // asks for columns of a row that will be written
  FFF_INLINE void fetch(const Int8Output& o, int64_t place, int64_t n) {
    if (o.streams) return;
    const char* first = (const char*)(o.y + place);
    for (int64_t i = 0; i < n * (int64_t)sizeof(typename E::type); i += 64) __builtin_prefetch(first + i, 1, 3);
  }
};

template <class E>
static Int8Output<E> int8_output_of(const LeafShape& s, void* y, float* wide, int64_t tree) {
  const bool streams = E::kIsFloat && s.trees == 1 && s.out_width % kInt8Block == 0 &&
                       should_stream(y, s.num_rows, s.out_width * (int64_t)sizeof(float));
  return {(typename E::type*)y, wide, tree == 0, tree == s.trees - 1, streams};
}

// Columns [begin, end) of y for `count` rows at one leaf, begin a multiple of 16. `then` are the weights that are
// read next.
template <class E>
static void int8_output(const Int8Chunk& chunk, const Int8Leaf& leaf, const uint8_t* const* q, const RowScale* scales,
                        const int32_t* rows_of_y, const float* confidences, int64_t count, int64_t begin, int64_t end,
                        const int8_t* then, int32_t* dots, const Int8Output<E>& output) {
  const LeafShape& s = *chunk.shape;
  const int64_t columns = padded_columns(s.leaf_width);
  for (int64_t row = begin; row < end; row += kInt8Panel) {
    const int64_t rows = min64(kInt8Panel, end - row);
    const int8_t* next = ahead(leaf.weight_out, chunk.out_bytes(), row * columns, then);
    for (int64_t i = 0; i < count; ++i) Int8Output<E>::fetch(output, rows_of_y[i] * s.out_width + row, rows);
    chunk.products({q, count, columns / 4, leaf.weight_out + row * columns, rows, dots, kInt8Panel, next});
    for (int64_t column = row; column < row + rows; column += kInt8Block) {
      const BlockScales block(leaf.sum_out + column, leaf.scale_out + column,
                              leaf.bias_out ? leaf.bias_out + column : nullptr, row + rows - column);
      for (int64_t i = 0; i < count; ++i) {
        Floats values;
        block_values(block, dots + i * kInt8Panel + column - row, scales[i], &values);
        Int8Output<E>::add(output, rows_of_y[i] * s.out_width + column, confidences[i] * values, row + rows - column);
      }
    }
  }
  if (output.streams) finish_streams();
}

// Scratch memory of one thread for `block` rows of one leaf.
struct Int8Memory {
  Scratch<float> hidden;
  Scratch<uint8_t> q;
  Scratch<int32_t> dots;
  int64_t block, width;
  Int8Memory(int64_t threads, int64_t block, int64_t leaf_width)
      : hidden(threads * block * padded_rows(leaf_width)),
        q(threads * block * padded_columns(leaf_width)),
        dots(threads * block * kInt8Panel),
        block(block),
        width(leaf_width) {}
  bool missing() const { return hidden.missing() || q.missing() || dots.missing(); }
  float* hidden_of(int worker) const { return hidden.data + worker * block * padded_rows(width); }
  uint8_t* q_of(int worker) const { return q.data + worker * block * padded_columns(width); }
  int32_t* dots_of(int worker) const { return dots.data + worker * block * kInt8Panel; }
};

// The rows of one task through their leaf. `then` are the weights that are read next.
template <class E>
static void run_int8_leaf(const Int8Chunk& chunk, int64_t tree, const LeafTask& task, const int32_t* rows,
                          const int8_t* then, const Int8Memory& memory, int worker, const Int8Output<E>& output) {
  const LeafShape& s = *chunk.shape;
  const int64_t count = task.end - task.begin, w = s.leaf_width;
  const Int8Leaf leaf = chunk.leaf(tree, task.leaf);
  const uint8_t* q[kLeafBlock];
  RowScale scales[kLeafBlock];
  float confidences[kLeafBlock];
  for (int64_t i = 0; i < count; ++i) {
    q[i] = chunk.q + rows[i] * padded_columns(s.in_width);
    scales[i] = chunk.scales[rows[i]];
    confidences[i] = confidence_of(chunk.routes[rows[i] * s.trees + tree].margin);
  }
  float* hidden = memory.hidden_of(worker);
  const int64_t stride = padded_rows(w);
  int8_hidden(chunk, leaf, q, scales, count, 0, w, memory.dots_of(worker), hidden, stride);
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* out = memory.q_of(worker) + i * padded_columns(w);
    scales[i] = quantize_row(hidden + i * stride, w, out);
    q[i] = out;
  }
  int8_output(chunk, leaf, q, scales, rows, confidences, count, 0, s.out_width, then, memory.dots_of(worker), output);
}

// Blocks of 16 that one thread takes where threads share one row's work.
static int64_t shared_blocks(int64_t width, int threads) {
  const int64_t blocks = ceil_div(width, kInt8Block);
  return max64(1, threads == 1 ? blocks : ceil_div(blocks, threads));
}

// A few rows: the neurons, then the columns of y are shared among the threads.
template <class E>
static Status int8_leaf_few(const Int8Chunk& chunk, float* wide) {
  const LeafShape& s = *chunk.shape;
  const int64_t w = s.leaf_width, padded = padded_columns(w), paths = s.num_rows * s.trees;
  const int64_t stride = padded_rows(w);
  Scratch<float> hidden(paths * stride);
  Scratch<uint8_t> quantized(paths * padded);
  Scratch<RowScale> hidden_scales(paths);
  Scratch<int32_t> dots(s.threads * kInt8Panel);
  if (hidden.missing() || quantized.missing() || hidden_scales.missing() || dots.missing()) return kNoMemory;
  const int64_t neurons = shared_blocks(w, s.threads) * kInt8Block, pieces = ceil_div(w, neurons);
  auto run_neurons = [&](int64_t i, int worker) {
    const int64_t path = i / pieces, row = path / s.trees, begin = i % pieces * neurons;
    const uint8_t* q = chunk.q + row * padded_columns(s.in_width);
    int8_hidden(chunk, chunk.leaf(path % s.trees, chunk.routes[path].leaf), &q, chunk.scales + row, 1, begin,
                min64(w, begin + neurons), dots.data + worker * kInt8Panel, hidden.data + path * stride, stride);
  };
  parallel(s.threads, paths * pieces, run_neurons);
  for (int64_t path = 0; path < paths; ++path)
    hidden_scales.data[path] = quantize_row(hidden.data + path * stride, w, quantized.data + path * padded);
  const int64_t columns = shared_blocks(s.out_width, s.threads) * kInt8Block, slices = ceil_div(s.out_width, columns);
  auto run_columns = [&](int64_t i, int worker) {
    const int32_t row = (int32_t)(i / slices);
    const int64_t begin = i % slices * columns;
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      const int64_t path = row * s.trees + tree;
      const float confidence = confidence_of(chunk.routes[path].margin);
      const uint8_t* q = quantized.data + path * padded;
      const Int8Output<E> output = int8_output_of<E>(s, chunk.tensors->y, wide, tree);
      int8_output(chunk, chunk.leaf(tree, chunk.routes[path].leaf), &q, hidden_scales.data + path, &row, &confidence,
                  1, begin, min64(s.out_width, begin + columns), nullptr, dots.data + worker * kInt8Panel, output);
    }
  };
  parallel(s.threads, s.num_rows * slices, run_columns);
  return kDone;
}

template <class E>
static Status int8_leaf_many(const Int8Chunk& chunk, float* wide) {
  const LeafShape& s = *chunk.shape;
  const int64_t block = min64(kLeafBlock, max64(4, ceil_div(s.num_rows, 2 * s.threads)));
  RowsByLeaf by_leaf(s.num_rows, s.leaves(), block);
  const Int8Memory memory(s.threads, block, s.leaf_width);
  if (by_leaf.missing() || memory.missing()) return kNoMemory;
  for (int64_t tree = 0; tree < s.trees; ++tree) {
    for (int64_t i = 0; i < s.num_rows; ++i) by_leaf.keys.data[i] = (uint32_t)chunk.routes[i * s.trees + tree].leaf;
    by_leaf.group(s.depth);
    const Int8Output<E> output = int8_output_of<E>(s, chunk.tensors->y, wide, tree);
    auto task = [&](int64_t i, int worker) {
      const LeafTask* leaf = by_leaf.tasks.data + i;
      const int8_t* then = i + 1 < by_leaf.num_tasks ? chunk.leaf(tree, leaf[1].leaf).weight_in : nullptr;
      run_int8_leaf(chunk, tree, *leaf, by_leaf.rows.data + leaf->begin, then, memory, worker, output);
    };
    parallel(s.threads, by_leaf.num_tasks, task);
  }
  return kDone;
}

// Quantises every row of x (N, H), in floats, scaled by input_scale.
static Status quantize_rows(const LeafShape& s, const float* x, const float* input_scale, uint8_t* q,
                            RowScale* scales) {
  Scratch<float> scaled(s.threads * max64(1, s.in_width));
  if (scaled.missing()) return kNoMemory;
  const int64_t slice = 32;
  auto task = [&](int64_t i, int worker) {
    float* row = scaled.data + worker * s.in_width;
    for (int64_t r = i * slice; r < min64(s.num_rows, (i + 1) * slice); ++r) {
      scale_row(x + r * s.in_width, input_scale, s.in_width, row);
      scales[r] = quantize_row(row, s.in_width, q + r * padded_columns(s.in_width));
    }
  };
  parallel(s.threads, ceil_div(s.num_rows, slice), task);
  return kDone;
}

template <class E>
static Status int8_leaf_chunk(const LeafShape& s, const Int8LeafTensors& tensors, Int8Products products) {
  const int64_t values = s.num_rows * s.in_width, sums = E::kIsFloat || s.trees == 1 ? 0 : s.num_rows * s.out_width;
  Scratch<Route> routes(s.num_rows * s.trees);
  Scratch<float> wide_x(E::kIsFloat ? 1 : max64(1, values)), wide(max64(1, sums));
  Scratch<uint8_t> q(max64(1, s.num_rows * padded_columns(s.in_width)));
  Scratch<RowScale> scales(s.num_rows);
  if (routes.missing() || wide_x.missing() || wide.missing() || q.missing() || scales.missing()) return kNoMemory;
  const float* x = E::kIsFloat ? (const float*)tensors.x : wide_x.data;
  if (!E::kIsFloat) widen_plain<E>((const typename E::type*)tensors.x, values, wide_x.data);
  LeafForwardTensors routed = {};
  routed.x = x;
  routed.router = tensors.router;
  routed.threshold = tensors.threshold;
  Status status = find_routes<F32>(s, routed, routes.data);
  if (status == kDone) status = quantize_rows(s, x, tensors.input_scale, q.data, scales.data);
  if (status != kDone) return status;
  if (tensors.leaves)
    for (int64_t i = 0; i < s.num_rows * s.trees; ++i) {
      tensors.leaves[i] = routes.data[i].leaf;
      tensors.margins[i] = routes.data[i].margin;
    }
  const Int8Chunk chunk = {&s, &tensors, products, routes.data, q.data, scales.data};
  float* between = sums ? wide.data : nullptr;
  return s.num_rows <= 2 ? int8_leaf_few<E>(chunk, between) : int8_leaf_many<E>(chunk, between);
}

template <class E>
static Status int8_leaf_forward(const LeafShape& s, const Int8LeafTensors& tensors, Int8Products products) {
  const int64_t floats = E::kIsFloat ? 0 : s.in_width + (s.trees == 1 ? 0 : s.out_width);
  const int64_t bytes_per_row = 4 * (s.trees * (s.depth + 8) + floats + 6) + padded_columns(s.in_width);
  auto advance = [&](Int8LeafTensors* slice, int64_t begin) {
    if (!slice->leaves) return;
    slice->leaves += begin * s.trees;
    slice->margins += begin * s.trees;
  };
  return by_chunks<E>(
      s, tensors, bytes_per_row, kLeafBlock, advance,
      [&](const LeafShape& part, const Int8LeafTensors& slice) { return int8_leaf_chunk<E>(part, slice, products); });
}

}  // namespace FFF_ISA
}  // namespace fff

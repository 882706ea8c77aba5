// The forward pass of leaf trees: route, then every leaf for the rows that chose it.
//
//   y += c * (activation(x W_in[leaf]^T + b_in[leaf]) W_out[leaf] + b_out[leaf])
//
// c is multiplied into the activations and the output bias. Trees come one after the other, so that a row's sum has
// one order whatever the number of rows or threads.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int64_t kLeafBlock = 64;  // rows of one task: their x (192 kB at 768 float32 columns) stays in cache

// Sums of rows that grow from tree to tree: y, or the gradient of x. They wait in y itself, or where its elements are
// narrower than float in rows of floats.
template <class E>
struct RowSums {
  typedef typename E::type T;
  T* y;         // (N, width)
  float* wide;  // (N, padded width) as E::load2 orders them, or null
  int64_t width;
  bool first, last, streams;

  bool stays_wide() const { return wide && !last; }
  float* wide_row(int64_t row, float* scratch) const {
    return stays_wide() ? wide + row * padded_width(width) : scratch;
  }
  // out = earlier trees' sum of the row + scale * addend, columns [begin, end)
  void start(int64_t row, float scale, const T* addend, int64_t begin, int64_t end, float* out) const {
    for (int64_t i = begin; i < end; i += kPair) {
      const int n = (int)min64(end - i, kPair);
      vec a = zero(), b = zero(), c, d;
      if (!first) {
        if (E::kIsFloat)
          E::load2_first(y + row * width + i, n, &a, &b);
        else
          F32::load2(wide + row * padded_width(width) + i, &a, &b);
      }
      if (addend) {
        E::load2_first(addend + i, n, &c, &d);
        a = fma(broadcast(scale), c, a);
        b = fma(broadcast(scale), d, b);
      }
      F32::store2(out + i, a, b);
    }
  }
};

template <class E>
static RowSums<E> row_sums(const LeafShape& s, void* y, int64_t width, float* wide, int64_t tree) {
  const int64_t row_bytes = width * (int64_t)sizeof(typename E::type);
  const bool whole_lines = kPair * sizeof(typename E::type) >= 64;
  return {(typename E::type*)y,
          wide,
          width,
          tree == 0,
          tree == s.trees - 1,
          whole_lines && s.trees == 1 && should_stream(y, s.num_rows, row_bytes)};
}

// Floats that sums between trees need, for `num_rows` rows.
template <class E>
static int64_t wide_floats(const LeafShape& s, int64_t num_rows, int64_t width) {
  return E::kIsFloat || s.trees == 1 ? 0 : num_rows * padded_width(width);
}

// One tree of a forward pass, with pointers to its own parameters.
template <class E>
struct LeafTree {
  typedef typename E::type T;
  const LeafShape* shape;
  const T *x, *weight_in, *bias_in, *weight_out, *bias_out;
  RowSums<E> y;
  float* logits;  // (N, P, w) at this tree, or null
};

template <class E>
static LeafTree<E> leaf_tree(const LeafShape& s, const LeafForwardTensors& tensors, int64_t tree, float* wide) {
  typedef const typename E::type* In;
  const int64_t leaves = s.leaves(), neurons = leaves * s.leaf_width;
  return {&s,
          (In)tensors.x,
          (In)tensors.weight_in + tree * neurons * s.in_width,
          tensors.bias_in ? (In)tensors.bias_in + tree * neurons : nullptr,
          (In)tensors.weight_out + tree * neurons * s.out_width,
          tensors.bias_out ? (In)tensors.bias_out + tree * leaves * s.out_width : nullptr,
          row_sums<E>(s, tensors.y, s.out_width, wide, tree),
          tensors.logits ? tensors.logits + tree * s.leaf_width : nullptr};
}

// The output bias of a leaf, or null.
template <class E>
FFF_INLINE const typename E::type* output_bias(const LeafTree<E>& tree, int64_t leaf) {
  return tree.bias_out ? tree.bias_out + leaf * tree.shape->out_width : nullptr;
}

// Hidden values of one leaf's neurons [first, first + count): logits become c * activation(logits), in place.
template <class E>
static void finish_neurons(const LeafTree<E>& tree, int64_t neuron, int64_t count, float confidence, float* hidden,
                           float* logits) {
  if (tree.bias_in)
    for (int64_t j = 0; j < count; ++j) hidden[j] += E::widen(tree.bias_in[neuron + j]);
  if (logits) memcpy(logits, hidden, count * sizeof(float));
  activate(tree.shape->activation, hidden, hidden, count);
  for (int64_t j = 0; j < count; ++j) hidden[j] *= confidence;
}

// Scratch memory of one thread for one task.
template <class E>
struct LeafScratch {
  float* hidden;                     // (block, w)
  float* wide;                       // (block, padded output width)
  float* input;                      // (block, padded input width) where E::kWidens
  const typename E::type** weights;  // w rows
};

template <class E>
struct LeafMemory {
  Scratch<float> floats;
  Scratch<const typename E::type*> pointers;
  int64_t leaf_width, hidden, wide, input;
  LeafMemory(const LeafShape& s, int64_t block, int64_t in_width, int64_t out_width)
      : floats(s.threads * block *
               (s.leaf_width + padded_width(out_width) + (E::kWidens ? padded_width(in_width) : 0))),
        pointers(s.threads * s.leaf_width),
        leaf_width(s.leaf_width),
        hidden(block * s.leaf_width),
        wide(block * padded_width(out_width)),
        input(E::kWidens ? block * padded_width(in_width) : 0) {}
  bool missing() const { return floats.missing() || pointers.missing(); }
  LeafScratch<E> of(int worker) const {
    float* first = floats.data + worker * (hidden + wide + input);
    return {first, first + hidden, first + hidden + wide, pointers.data + worker * leaf_width};
  }
};

// Pointers to rows of x for row_products.
template <class E>
static void factor_rows(const typename E::type* x, int64_t width, const int32_t* rows, int64_t count, float* wide,
                        const typename E::factor** out) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (!E::kWidens) {
      out[i] = x + rows[i] * width;
    } else {
      out[i] = wide + i * padded_width(width);
      widen_row<E>(x + rows[i] * width, width, wide + i * padded_width(width));
    }
  }
}

// The rows of one task through their leaf.
template <class E>
static void run_leaf(const LeafTree<E>& tree, const LeafTask& task, const int32_t* rows, const Route* routes,
                     const LeafScratch<E>& scratch) {
  const LeafShape& s = *tree.shape;
  const int64_t count = task.end - task.begin, w = s.leaf_width;
  const typename E::factor* x[kLeafBlock];
  float* wide[kLeafBlock];
  typename E::type* y[kLeafBlock];
  factor_rows<E>(tree.x, s.in_width, rows, count, scratch.input, x);
  row_products<E>(x, count, tree.weight_in + task.leaf * w * s.in_width, w, s.in_width, scratch.hidden, w);
  for (int64_t i = 0; i < count; ++i) {
    const float confidence = confidence_of(routes[rows[i] * s.trees].margin);
    float* logits = tree.logits ? tree.logits + rows[i] * s.trees * w : nullptr;
    finish_neurons(tree, task.leaf * w, w, confidence, scratch.hidden + i * w, logits);
    y[i] = tree.y.y + rows[i] * s.out_width;
    wide[i] = tree.y.wide_row(rows[i], scratch.wide + i * padded_width(s.out_width));
    tree.y.start(rows[i], confidence, output_bias(tree, task.leaf), 0, s.out_width, wide[i]);
  }
  for (int64_t k = 0; k < w; ++k) scratch.weights[k] = tree.weight_out + (task.leaf * w + k) * s.out_width;
  const WeightedRows<E> sum = {
      scratch.weights, w, s.out_width, scratch.hidden, w, wide, y, false, !tree.y.stays_wide(), tree.y.streams};
  sum_weighted_rows(sum, count, 0, s.out_width);
  if (tree.y.streams) finish_streams();
}

// A few rows: the neurons, then the columns of y are shared among the threads.
template <class E>
static Status leaf_forward_few(const LeafShape& s, const LeafForwardTensors& tensors, const Route* routes) {
  const int64_t w = s.leaf_width, padded = padded_width(s.out_width), paths = s.num_rows * s.trees;
  const int64_t padded_in = E::kWidens ? padded_width(s.in_width) : 0;
  Scratch<float> hidden(paths * w), wide(max64(1, s.num_rows * padded)), wide_x(max64(1, s.num_rows * padded_in));
  Scratch<float> between(max64(1, wide_floats<E>(s, s.num_rows, s.out_width)));
  Scratch<const typename E::type*> weights(paths * w);
  if (hidden.missing() || wide.missing() || wide_x.missing() || between.missing() || weights.missing())
    return kNoMemory;
  float* trees_wide = wide_floats<E>(s, 1, s.out_width) ? between.data : nullptr;
  const typename E::factor* x[2];
  const int32_t rows[2] = {0, 1};
  factor_rows<E>((const typename E::type*)tensors.x, s.in_width, rows, s.num_rows, wide_x.data, x);
  const int64_t neurons = s.threads == 1 ? w : max64(8, ceil_div(ceil_div(w, s.threads), 8) * 8);
  const int64_t pieces = ceil_div(w, neurons);
  auto run_neurons = [&](int64_t i, int) {
    const int64_t path = i / pieces, row = path / s.trees, first = i % pieces * neurons;
    const int64_t count = min64(neurons, w - first), neuron = routes[path].leaf * w + first;
    const LeafTree<E> tree = leaf_tree<E>(s, tensors, path % s.trees, nullptr);
    float* out = hidden.data + path * w + first;
    row_products<E>(x + row, 1, tree.weight_in + neuron * s.in_width, count, s.in_width, out, w);
    float* logits = tree.logits ? tree.logits + row * s.trees * w + first : nullptr;
    finish_neurons(tree, neuron, count, confidence_of(routes[path].margin), out, logits);
    for (int64_t k = 0; k < count; ++k)
      weights.data[path * w + first + k] = tree.weight_out + (neuron + k) * s.out_width;
  };
  parallel(s.threads, paths * pieces, run_neurons);
  const int64_t columns =
      s.threads == 1 ? max64(1, s.out_width) : max64(1, ceil_div(ceil_div(s.out_width, s.threads), kPair)) * kPair;
  const int64_t slices = ceil_div(s.out_width, columns);
  auto run_columns = [&](int64_t i, int) {
    const int64_t row = i / slices, begin = i % slices * columns, end = min64(s.out_width, begin + columns);
    for (int64_t t = 0; t < s.trees; ++t) {
      const Route& route = routes[row * s.trees + t];
      const LeafTree<E> tree = leaf_tree<E>(s, tensors, t, trees_wide);
      float* target = tree.y.wide_row(row, wide.data + row * padded);
      typename E::type* y = tree.y.y + row * s.out_width;
      tree.y.start(row, confidence_of(route.margin), output_bias(tree, route.leaf), begin, end, target);
      const WeightedRows<E> sum = {weights.data + (row * s.trees + t) * w,
                                   w,
                                   s.out_width,
                                   hidden.data + (row * s.trees + t) * w,
                                   w,
                                   &target,
                                   &y,
                                   false,
                                   !tree.y.stays_wide(),
                                   false};
      sum_weighted_rows(sum, 1, begin, end);
    }
  };
  parallel(s.threads, s.num_rows * slices, run_columns);
  return kDone;
}

// As many rows as the scratch memory allows, by leaf.
template <class E>
static Status leaf_forward_many(const LeafShape& s, const LeafForwardTensors& tensors, const Route* routes) {
  const int64_t block = min64(kLeafBlock, max64(4, ceil_div(s.num_rows, 2 * s.threads)));
  RowsByLeaf by_leaf(s.num_rows, s.leaves(), block);
  const int64_t between = wide_floats<E>(s, s.num_rows, s.out_width);
  Scratch<float> wide(max64(1, between));
  const LeafMemory<E> memory(s, block, s.in_width, s.out_width);
  if (by_leaf.missing() || wide.missing() || memory.missing()) return kNoMemory;
  for (int64_t t = 0; t < s.trees; ++t) {
    for (int64_t i = 0; i < s.num_rows; ++i) by_leaf.keys.data[i] = (uint32_t)routes[i * s.trees + t].leaf;
    by_leaf.group(s.depth);
    const LeafTree<E> tree = leaf_tree<E>(s, tensors, t, between ? wide.data : nullptr);
    auto task = [&](int64_t i, int worker) {
      const LeafTask& leaf = by_leaf.tasks.data[i];
      run_leaf(tree, leaf, by_leaf.rows.data + leaf.begin, routes + t, memory.of(worker));
    };
    parallel(s.threads, by_leaf.num_tasks, task);
  }
  return kDone;
}

template <class E>
static Status leaf_forward_chunk(const LeafShape& s, const LeafForwardTensors& tensors) {
  Scratch<Route> routes(s.num_rows * s.trees);
  if (routes.missing()) return kNoMemory;
  Status status = find_routes<E>(s, tensors, routes.data);
  if (status != kDone) return status;
  if (tensors.leaves)
    for (int64_t i = 0; i < s.num_rows * s.trees; ++i) {
      tensors.leaves[i] = routes.data[i].leaf;
      tensors.deciders[i] = routes.data[i].decider;
      tensors.margins[i] = routes.data[i].margin;
    }
  return s.num_rows <= 2 ? leaf_forward_few<E>(s, tensors, routes.data)
                         : leaf_forward_many<E>(s, tensors, routes.data);
}

template <class E>
static Status leaf_forward(const LeafShape& s, const LeafForwardTensors& tensors) {
  const int64_t bytes_per_row = 4 * (s.trees * (s.depth + 8) + wide_floats<E>(s, 1, s.out_width) + 4);
  auto advance = [&](LeafForwardTensors* slice, int64_t begin) {
    if (!slice->leaves) return;
    slice->leaves += begin * s.trees;
    slice->deciders += begin * s.trees;
    slice->margins += begin * s.trees;
    slice->logits += begin * s.trees * s.leaf_width;
  };
  return by_chunks<E>(s, tensors, bytes_per_row, kLeafBlock, advance, leaf_forward_chunk<E>);
}

}  // namespace FFF_ISA
}  // namespace fff

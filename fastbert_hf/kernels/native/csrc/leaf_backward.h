// The backward pass of leaf trees, with the decisions held constant. For a row with confidence c at a leaf:
//
//   g       = grad_y W_out[leaf]^T                          gradient of the hidden values before c
//   grad_c  = <activation(logits), g> + <grad_y, b_out[leaf]>
//   grad_l  = grad_c * c (1 - c) * sign(l)                  of the least certain decision's logit l
//   grad_z  = c * g * activation'(logits)
//   grad_x  = grad_z W_in[leaf] + grad_l * router[decider]
//
// and the parameters' gradients are sums over the rows of a leaf (grad_z x, c * activation grad_y) or over those of
// a decider (grad_l x). One tree after the other; a task owns what it writes, so sums have one order.
#pragma once

namespace fff {
namespace FFF_ISA {

// One tree of a backward pass.
template <class E>
struct LeafBackward {
  typedef typename E::type T;
  const LeafShape* shape;
  const T *grad_y, *x, *router, *weight_in, *weight_out, *bias_out;
  const Route* routes;  // (N, P) at this tree
  const float* logits;  // (N, P, w) at this tree
  RowSums<E> grad_x;    // y is null where not wanted
  // Of the tree's rows in sorted order, a leaf's neurons by its rows: neuron k of the row at position `first + i` is
  // at [first * w + k * all + i].
  float *grad_hidden, *hidden;
  float *confidence, *grad_logit;  // (N) by position
  bool through_hidden;             // whether anything but weight_out and bias_out is wanted
};

static bool read_routes(const LeafShape& s, const LeafBackwardTensors& tensors, Route* routes) {
  for (int64_t i = 0; i < s.num_rows * s.trees; ++i) {
    const Route route = {tensors.leaves[i], tensors.deciders[i], tensors.margins[i]};
    if (route.leaf < 0 || route.leaf >= s.leaves() || route.decider < 0) return false;
    if (s.depth > 0) {
      const int level = 31 - __builtin_clz((uint32_t)route.decider + 1u);
      if (level >= s.depth || node_on_path((uint32_t)route.leaf, s.depth, level) != route.decider) return false;
    }
    routes[i] = route;
  }
  return true;
}

// Gradient of the least certain decision's logit; g holds grad_y W_out^T, a the activations.
template <class E>
static float decision_gradient(const LeafBackward<E>& tree, const Route& route, const typename E::type* grad_y,
                               const float* g, const float* a) {
  const LeafShape& s = *tree.shape;
  if (s.depth == 0) return 0.0f;
  float grad_c, from_bias = 0.0f;
  dot_tile<F32, 1>(g, &a, s.leaf_width, &grad_c);
  if (tree.bias_out) dot_tile<E, 1>(tree.bias_out + route.leaf * s.out_width, &grad_y, s.out_width, &from_bias);
  const float c = confidence_of(route.margin);
  const float sign = route.margin > 0.0f ? 1.0f : (route.margin < 0.0f ? -1.0f : route.margin);  // NaN stays, 0 is 0
  return (grad_c + from_bias) * (c * (1.0f - c)) * sign;
}

// The rows of one task back through their leaf.
template <class E>
static void run_leaf_backward(const LeafBackward<E>& tree, const LeafTask& task, const int32_t* rows,
                              const LeafScratch<E>& scratch, float* activations) {
  const LeafShape& s = *tree.shape;
  const int64_t count = task.end - task.begin, w = s.leaf_width;
  const typename E::factor* grad_y[kLeafBlock];
  float* wide[kLeafBlock];
  typename E::type* grad_x[kLeafBlock];
  if (tree.through_hidden) {
    factor_rows<E>(tree.grad_y, s.out_width, rows, count, scratch.input, grad_y);
    row_products<E>(grad_y, count, tree.weight_out + task.leaf * w * s.out_width, w, s.out_width, scratch.hidden, w);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[i], position = task.begin + i;
    const Route& route = tree.routes[row * s.trees];
    const float c = confidence_of(route.margin), *logits = tree.logits + row * s.trees * w;
    float* g = scratch.hidden + i * w;
    float* to = tree.hidden + (int64_t)task.first * w + (position - task.first);
    activate(s.activation, logits, activations, w);
    for (int64_t k = 0; k < w; ++k) to[k * task.all] = c * activations[k];
    tree.confidence[position] = c;
    if (!tree.through_hidden) continue;
    const float grad_l = decision_gradient(tree, route, tree.grad_y + row * s.out_width, g, activations);
    for (int64_t k = 0; k < w; ++k) g[k] *= c;
    activate_backward(s.activation, logits, g, w);
    to = tree.grad_hidden + (int64_t)task.first * w + (position - task.first);
    for (int64_t k = 0; k < w; ++k) to[k * task.all] = g[k];
    tree.grad_logit[position] = grad_l;
    if (!tree.grad_x.y) continue;
    grad_x[i] = tree.grad_x.y + row * s.in_width;
    wide[i] = tree.grad_x.wide_row(row, scratch.wide + i * padded_width(s.in_width));
    const typename E::type* router = s.depth > 0 ? tree.router + route.decider * s.in_width : nullptr;
    tree.grad_x.start(row, grad_l, router, 0, s.in_width, wide[i]);
  }
  if (!tree.through_hidden || !tree.grad_x.y) return;
  for (int64_t k = 0; k < w; ++k) scratch.weights[k] = tree.weight_in + (task.leaf * w + k) * s.in_width;
  const WeightedRows<E> sum = {
      scratch.weights,    w, s.in_width, scratch.hidden, w, wide, grad_x, false, !tree.grad_x.stays_wide(),
      tree.grad_x.streams};
  sum_weighted_rows(sum, count, 0, s.in_width);
  if (tree.grad_x.streams) finish_streams();
}

// ---- gradients of the parameters ----

// What sums over the rows of a group become: row j of the gradient is sum over the rows i of the group of
// coefficients[first * outputs + j * all + i] * vectors[row i].
template <class E>
struct GroupSums {
  typedef typename E::type T;
  int64_t num_groups, outputs, width;
  const float* coefficients;
  const T* vectors;  // (N, width)
  T* gradient;       // (num_groups * outputs, width)
};

// One task for each group with rows: rows of the sorted order that share a key.
struct RowGroups {
  Scratch<LeafTask> groups;
  Scratch<uint8_t> has_rows;
  int64_t num_groups;
  RowGroups(const RowsByLeaf& by_leaf, int64_t num_keys)
      : groups(min64(num_keys, by_leaf.num_rows)), has_rows(num_keys), num_groups(0) {
    if (missing()) return;
    memset(has_rows.data, 0, num_keys);
    for (int64_t i = 0; i < by_leaf.num_tasks; ++i) {
      const LeafTask& task = by_leaf.tasks.data[i];
      if (task.begin != task.first) continue;
      has_rows.data[task.leaf] = 1;
      groups.data[num_groups++] = task;
    }
  }
  bool missing() const { return groups.missing() || has_rows.missing(); }
};

constexpr int64_t kGradientColumns = 128;  // of one task
constexpr int64_t kGradientRows = 48;      // outputs of one task: their float sums (24 kB) stay in cache

// Scratch memory of one thread: pointers to a group's vectors, and float sums of one task's outputs.
template <class E>
struct GroupMemory {
  Scratch<const typename E::type*> vectors;
  Scratch<float> wide;
  int64_t num_rows;
  GroupMemory(int threads, int64_t num_rows)
      : vectors(threads * num_rows),
        wide(threads * kGradientRows * padded_width(kGradientColumns)),
        num_rows(num_rows) {}
  bool missing() const { return vectors.missing() || wide.missing(); }
};

// Outputs [output, output + count) of one group, columns [begin, end).
template <class E>
static void sum_group(const GroupSums<E>& g, const LeafTask& group, const int32_t* sorted, int64_t output,
                      int64_t count, int64_t begin, int64_t end, const typename E::type** vectors, float* memory) {
  float* wide[kGradientRows];
  typename E::type* to[kGradientRows];
  for (int64_t i = 0; i < group.all; ++i) vectors[i] = g.vectors + (int64_t)sorted[group.first + i] * g.width;
  for (int64_t j = 0; j < count; ++j) {
    wide[j] = memory + j * padded_width(kGradientColumns) - begin;
    to[j] = g.gradient + (group.leaf * g.outputs + output + j) * g.width;
  }
  const float* coefficients = g.coefficients + (int64_t)group.first * g.outputs + output * group.all;
  const WeightedRows<E> sum = {vectors, group.all, g.width, coefficients, group.all, wide, to, true, true, false};
  sum_weighted_rows(sum, count, begin, end);
}

template <class E>
static void sum_groups(const GroupSums<E>& g, const RowGroups& groups, const int32_t* sorted, int threads,
                       const GroupMemory<E>& memory) {
  if (!g.gradient) return;
  const int64_t slices = max64(1, ceil_div(g.width, kGradientColumns)), parts = ceil_div(g.outputs, kGradientRows);
  auto task = [&](int64_t i, int worker) {
    const LeafTask& group = groups.groups.data[i / (slices * parts)];
    const int64_t output = i / slices % parts * kGradientRows, begin = i % slices * kGradientColumns;
    sum_group(g, group, sorted, output, min64(kGradientRows, g.outputs - output), begin,
              min64(g.width, begin + kGradientColumns), memory.vectors.data + worker * memory.num_rows,
              memory.wide.data + worker * kGradientRows * padded_width(kGradientColumns));
  };
  parallel(threads, groups.num_groups * slices * parts, task);
  auto clear = [&](int64_t group, int) {
    const int64_t size = g.outputs * g.width;
    if (!groups.has_rows.data[group]) memset(g.gradient + group * size, 0, size * sizeof(typename E::type));
  };
  parallel(threads, g.num_groups, clear);
}

// gradient[(group, j)] = scale * sum over the group's rows of coefficients, for a bias of one element an output
template <class E>
static void sum_coefficients(const GroupSums<E>& g, const RowGroups& groups, float scale, void* gradient) {
  if (!gradient) return;
  typename E::type* to = (typename E::type*)gradient;
  memset(to, 0, g.num_groups * g.outputs * sizeof(typename E::type));
  for (int64_t i = 0; i < groups.num_groups; ++i) {
    const LeafTask& group = groups.groups.data[i];
    for (int64_t j = 0; j < g.outputs; ++j) {
      const float* values = g.coefficients + (int64_t)group.first * g.outputs + j * group.all;
      float sum = 0.0f;
      for (int64_t k = 0; k < group.all; ++k) sum += values[k];
      E::store2_first(to + group.leaf * g.outputs + j, broadcast(scale * sum), zero(), 1);
    }
  }
}

template <class T>
FFF_INLINE T* at(void* base, int64_t offset) {
  return base ? (T*)base + offset : nullptr;
}

// All parameters' gradients of one tree.
template <class E>
static Status parameter_gradients(const LeafBackward<E>& tree, const LeafBackwardTensors& tensors, int64_t number,
                                  const RowsByLeaf& by_leaf, RowsByLeaf& by_decider, float* scratch,
                                  const GroupMemory<E>& memory) {
  typedef typename E::type T;
  const LeafShape& s = *tree.shape;
  const int64_t w = s.leaf_width, leaves = s.leaves(), routers = s.routers(), neurons = number * leaves * w;
  const RowGroups groups(by_leaf, leaves);
  if (groups.missing()) return kNoMemory;
  const GroupSums<E> in = {leaves,           w,      s.in_width,
                           tree.grad_hidden, tree.x, at<T>(tensors.grad_weight_in, neurons * s.in_width)};
  const GroupSums<E> out = {leaves,      w,           s.out_width,
                            tree.hidden, tree.grad_y, at<T>(tensors.grad_weight_out, neurons * s.out_width)};
  const GroupSums<E> bias = {leaves,      1,
                             s.out_width, tree.confidence,
                             tree.grad_y, at<T>(tensors.grad_bias_out, number * leaves * s.out_width)};
  sum_groups(in, groups, by_leaf.rows.data, s.threads, memory);
  sum_groups(out, groups, by_leaf.rows.data, s.threads, memory);
  sum_groups(bias, groups, by_leaf.rows.data, s.threads, memory);
  sum_coefficients<E>(in, groups, 1.0f, at<T>(tensors.grad_bias_in, neurons));
  if (routers == 0 || !(tensors.grad_router || tensors.grad_threshold)) return kDone;
  for (int64_t i = 0; i < s.num_rows; ++i) by_decider.keys.data[i] = (uint32_t)tree.routes[i * s.trees].decider;
  by_decider.group(s.depth);
  const RowGroups deciders(by_decider, routers);
  if (deciders.missing()) return kNoMemory;
  float *by_row = scratch, *sorted = scratch + s.num_rows;
  for (int64_t i = 0; i < s.num_rows; ++i) by_row[by_leaf.rows.data[i]] = tree.grad_logit[i];
  for (int64_t i = 0; i < s.num_rows; ++i) sorted[i] = by_row[by_decider.rows.data[i]];
  const GroupSums<E> router = {routers, 1,      s.in_width,
                               sorted,  tree.x, at<T>(tensors.grad_router, number * routers * s.in_width)};
  sum_groups(router, deciders, by_decider.rows.data, s.threads, memory);
  sum_coefficients<E>(router, deciders, -1.0f, at<T>(tensors.grad_threshold, number * routers));
  return kDone;
}

template <class E>
static Status leaf_backward(const LeafShape& s, const LeafBackwardTensors& tensors) {
  typedef const typename E::type* In;
  const int64_t w = s.leaf_width, n = s.num_rows, neurons = s.leaves() * w;
  const int64_t block = min64(kLeafBlock, max64(4, ceil_div(n, 2 * s.threads)));
  const bool through_hidden = tensors.grad_x || tensors.grad_router || tensors.grad_threshold ||
                              tensors.grad_weight_in || tensors.grad_bias_in;
  const int64_t between = tensors.grad_x ? wide_floats<E>(s, n, s.in_width) : 0;
  Scratch<Route> routes(n * s.trees);
  Scratch<float> hidden(n * w), grad_hidden(n * w), by_row(4 * n), activations(s.threads * w);
  Scratch<float> wide(max64(1, between));
  RowsByLeaf by_leaf(n, s.leaves(), block), by_decider(n, max64(1, s.routers()), n);
  const LeafMemory<E> memory(s, block, s.out_width, s.in_width);
  const GroupMemory<E> group_memory(s.threads, n);
  if (routes.missing() || hidden.missing() || grad_hidden.missing() || by_row.missing() || activations.missing() ||
      wide.missing() || by_leaf.missing() || by_decider.missing() || memory.missing() || group_memory.missing())
    return kNoMemory;
  if (!read_routes(s, tensors, routes.data)) return kBadPath;
  for (int64_t t = 0; t < s.trees; ++t) {
    const LeafBackward<E> tree = {&s,
                                  (In)tensors.grad_y,
                                  (In)tensors.x,
                                  (In)tensors.router + t * s.routers() * s.in_width,
                                  (In)tensors.weight_in + t * neurons * s.in_width,
                                  (In)tensors.weight_out + t * neurons * s.out_width,
                                  tensors.bias_out ? (In)tensors.bias_out + t * s.leaves() * s.out_width : nullptr,
                                  routes.data + t,
                                  tensors.logits + t * w,
                                  row_sums<E>(s, tensors.grad_x, s.in_width, between ? wide.data : nullptr, t),
                                  grad_hidden.data,
                                  hidden.data,
                                  by_row.data,
                                  by_row.data + n,
                                  through_hidden};
    for (int64_t i = 0; i < n; ++i) by_leaf.keys.data[i] = (uint32_t)routes.data[i * s.trees + t].leaf;
    by_leaf.group(s.depth);
    auto task = [&](int64_t i, int worker) {
      const LeafTask& leaf = by_leaf.tasks.data[i];
      run_leaf_backward(tree, leaf, by_leaf.rows.data + leaf.begin, memory.of(worker), activations.data + worker * w);
    };
    parallel(s.threads, by_leaf.num_tasks, task);
    const Status status =
        parameter_gradients(tree, tensors, t, by_leaf, by_decider, by_row.data + 2 * n, group_memory);
    if (status != kDone) return status;
  }
  return kDone;
}

}  // namespace FFF_ISA
}  // namespace fff

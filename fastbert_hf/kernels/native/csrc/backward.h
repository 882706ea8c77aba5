// The op's backward pass, with the decisions held constant.
//
//   gradient of the activations   <grad_y, weight_out row>, row by row along its path
//   gradient of the logits        the same times the activation's derivative
//   gradient of x                 weighted sum of rows of weight_in (sum.h)
//   gradients of the parameters   sums over the rows that visit a node (weight_gradient.h)
#pragma once

namespace fff {
namespace FFF_ISA {

// Rows by leaf, tree by tree, and which nodes any row visits.
struct Paths {
  Scratch<uint32_t> leaves;        // (N, P)
  Scratch<int32_t> sorted, spare;  // (P, N)
  Scratch<uint8_t> is_visited;     // (P, n)
  explicit Paths(const Shape& s)
      : leaves(s.num_rows * s.trees),
        sorted(s.num_rows * s.trees),
        spare(s.num_rows * s.trees),
        is_visited(s.trees * s.nodes()) {}
  bool missing() const { return leaves.missing() || sorted.missing() || spare.missing() || is_visited.missing(); }
};

// Takes the leaves from the visited nodes; false if those are not paths from the root.
static bool read_paths(const Shape& s, const int32_t* visited, Paths& paths) {
  const int64_t count = s.num_rows * s.trees, slice = 1024;
  uint8_t bad = 0;
  auto read_slice = [&](int64_t task, int) {
    bool fits = true;
    for (int64_t i = task * slice; i < min64(count, (task + 1) * slice); ++i) {
      const int32_t* path = visited + i * s.levels();
      const uint32_t leaf = (uint32_t)path[s.depth] - ((1u << s.depth) - 1u);
      paths.leaves.data[i] = leaf;
      bool path_fits = leaf < (1u << s.depth);
      for (int level = 0; path_fits && level < s.depth; ++level)
        path_fits = path[level] == node_on_path(leaf, s.depth, level);
      fits &= path_fits;
    }
    if (!fits) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  };
  parallel(s.threads, ceil_div(count, slice), read_slice);
  if (bad) return false;
  auto sort_tree = [&](int64_t tree, int) {
    int32_t* sorted = paths.sorted.data + tree * s.num_rows;
    for (int64_t i = 0; i < s.num_rows; ++i) sorted[i] = (int32_t)i;
    sort_by_key(sorted, paths.spare.data + tree * s.num_rows, s.num_rows, paths.leaves.data + tree, s.trees, s.depth);
    uint8_t* is_visited = paths.is_visited.data + tree * s.nodes();
    memset(is_visited, 0, s.nodes());
    uint32_t leaf = 0;
    for (int64_t i = 0; i < s.num_rows; ++i) {
      const uint32_t previous = leaf;
      leaf = paths.leaves.data[sorted[i] * s.trees + tree];
      if (i > 0 && leaf == previous) continue;
      for (int level = i == 0 ? 0 : first_difference(leaf, previous, s.depth); level <= s.depth; ++level)
        is_visited[node_on_path(leaf, s.depth, level)] = 1;
    }
  };
  parallel(s.threads, s.trees, sort_tree);
  return true;
}

template <class E, int T>
static __attribute__((noinline)) void leaf_dots(const typename E::type* const* rows, int64_t levels,
                                                const typename E::type* const* v, int64_t width, float* out) {
  int64_t level = 0;
  for (; level + 6 <= levels; level += 6) path_dots<E, T, 6>(rows + level, v, width, out + level, levels);
  for (; level + 3 <= levels; level += 3) path_dots<E, T, 3>(rows + level, v, width, out + level, levels);
  for (; level < levels; ++level) path_dots<E, T, 1>(rows + level, v, width, out + level, levels);
}

// grad_logits[(row, tree, level)] for rows sorted by leaf
template <class E>
static void logit_gradients(const Shape& s, const PathSum<E>& out, const typename E::type* grad_y,
                            const float* logits, int64_t tree, const int32_t* rows, int count, float* grad_logits,
                            const typename E::type** path) {
  const int64_t levels = s.levels();
  float dots[2 * 32], some_logits[2 * 32];
  uint32_t leaf = 0;
  for (int i = 0; i < count;) {
    const uint32_t previous = leaf;
    leaf = out.leaves[rows[i] * s.trees + tree];
    if (i == 0 || leaf != previous)
      for (int64_t level = i == 0 ? 0 : first_difference(leaf, previous, s.depth); level < levels; ++level)
        path[level] = out.weight + (tree * s.nodes() + node_on_path(leaf, s.depth, level)) * out.width;
    const int size = i + 1 < count && out.leaves[rows[i + 1] * s.trees + tree] == leaf ? 2 : 1;
    const typename E::type* vectors[2];
    for (int t = 0; t < size; ++t) {
      vectors[t] = grad_y + rows[i + t] * out.width;
      memcpy(some_logits + t * levels, logits + (rows[i + t] * s.trees + tree) * levels, levels * sizeof(float));
    }
    // fetch what rows some steps ahead need: their vector, and what their path does not share with the row before
    for (int ahead = i + 2 * kAhead; ahead < i + 2 * kAhead + size && ahead < count; ++ahead) {
      prefetch_row(grad_y + rows[ahead] * out.width, out.width * (int64_t)sizeof(typename E::type));
      const uint32_t next = out.leaves[rows[ahead] * s.trees + tree];
      const uint32_t before = out.leaves[rows[ahead - 1] * s.trees + tree];
      if (next != before) prefetch_path(out, tree, next, before, 0, out.width);
    }
    if (size == 2)
      leaf_dots<E, 2>(path, levels, vectors, out.width, dots);
    else
      leaf_dots<E, 1>(path, levels, vectors, out.width, dots);
    activate_backward(s.activation, some_logits, dots, size * levels);
    for (int t = 0; t < size; ++t)
      memcpy(grad_logits + (rows[i + t] * s.trees + tree) * levels, dots + t * levels, levels * sizeof(float));
    i += size;
  }
}

template <class E>
static Status all_logit_gradients(const Shape& s, const BackwardTensors& tensors, const Paths& paths,
                                  float* grad_logits) {
  typedef const typename E::type* In;
  const PathSum<E> out = paths_of<E>(s, tensors.weight_out, s.out_width, paths.leaves.data);
  const int64_t slice = 64, slices = ceil_div(s.num_rows, slice);
  auto task = [&](int64_t i, int) {
    In path[32];
    const int64_t tree = i / slices, begin = i % slices * slice;
    logit_gradients(s, out, (In)tensors.grad_y, tensors.logits, tree, paths.sorted.data + tree * s.num_rows + begin,
                    (int)min64(slice, s.num_rows - begin), grad_logits, path);
  };
  parallel(s.threads, s.trees * slices, task);
  return kDone;
}

// One weight's gradient: the rows of visited nodes by columns, zeros for the others.
template <class E>
static Status weight_gradient(const Shape& s, const Paths& paths, const float* coefficients, const void* vectors,
                              int64_t width, void* gradient) {
  typedef typename E::type T;
  WeightGradient<E> g = {};
  g.num_rows = s.num_rows;
  g.trees = s.trees;
  g.levels = s.levels();
  g.nodes = s.nodes();
  g.width = width;
  g.depth = s.depth;
  g.sorted = paths.sorted.data;
  g.leaves = paths.leaves.data;
  g.coefficients = coefficients;
  g.vectors = (const T*)vectors;
  g.gradient = (T*)gradient;
  g.streams = should_stream(gradient, s.trees * s.nodes(), width * (int64_t)sizeof(T));
  // wide enough that a row's piece fills some cache lines, narrow enough to occupy the threads
  int64_t columns = 4 * kStrip;
  while (columns > kStrip && s.trees * ceil_div(width, columns) < 3 * s.threads) columns -= kStrip;
  const int64_t pieces = ceil_div(width, columns), slice = 32, zero_tasks = ceil_div(s.trees * s.nodes(), slice);
  const int64_t carry_size = s.levels() * columns;
  Scratch<Run> runs(s.threads * kSegment);
  Scratch<float> carry(s.threads * carry_size);
  if (runs.missing() || carry.missing()) return kNoMemory;
  auto task = [&](int64_t i, int worker) {
    if (i < s.trees * pieces) {
      const int64_t begin = i % pieces * columns;
      sum_columns(g, i / pieces, begin, min64(width, begin + columns), runs.data + worker * kSegment,
                  carry.data + worker * carry_size);
      if (g.streams) finish_streams();
      return;
    }
    const int64_t first = (i - s.trees * pieces) * slice;
    for (int64_t node = first; node < min64(first + slice, s.trees * s.nodes()); ++node)
      if (!paths.is_visited.data[node]) memset(g.gradient + node * width, 0, width * sizeof(T));
  };
  parallel(s.threads, s.trees * pieces + zero_tasks, task);
  return kDone;
}

// The bias is a weight of width 1 whose vectors are all 1.
template <class E>
static Status bias_gradient(const Shape& s, const Paths& paths, const float* grad_logits, void* gradient) {
  typedef typename E::type T;
  Scratch<T> ones(s.num_rows);
  if (ones.missing()) return kNoMemory;
  for (int64_t i = 0; i < s.num_rows; ++i) ones.data[i] = E::one();
  return weight_gradient<E>(s, paths, grad_logits, ones.data, 1, gradient);
}

template <class E>
static Status backward(const Shape& s, const BackwardTensors& tensors) {
  const int64_t count = s.num_rows * s.visits();
  const bool through_logits = tensors.grad_x || tensors.grad_weight_in || tensors.grad_bias_in;
  Paths paths(s);
  if (paths.missing()) return kNoMemory;
  if (!read_paths(s, tensors.visited, paths)) return kBadPath;
  Scratch<float> coefficients(count);
  if (coefficients.missing()) return kNoMemory;
  Status status = kDone;
  if (through_logits) {
    status = all_logit_gradients<E>(s, tensors, paths, coefficients.data);
    if (status == kDone && tensors.grad_x)
      status = sum_paths(
          path_sum<E>(s, tensors.weight_in, s.in_width, coefficients.data, paths.leaves.data, tensors.grad_x));
    if (status == kDone && tensors.grad_weight_in)
      status = weight_gradient<E>(s, paths, coefficients.data, tensors.x, s.in_width, tensors.grad_weight_in);
    if (status == kDone && tensors.grad_bias_in)
      status = bias_gradient<E>(s, paths, coefficients.data, tensors.grad_bias_in);
  }
  if (status == kDone && tensors.grad_weight_out) {
    const int64_t slice = 4096;
    auto activate_slice = [&](int64_t i, int) {
      activate(s.activation, tensors.logits + i * slice, coefficients.data + i * slice,
               min64(slice, count - i * slice));
    };
    parallel(s.threads, ceil_div(count, slice), activate_slice);
    status = weight_gradient<E>(s, paths, coefficients.data, tensors.grad_y, s.out_width, tensors.grad_weight_out);
  }
  return status;
}

}  // namespace FFF_ISA
}  // namespace fff

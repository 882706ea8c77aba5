// Weighted sums along the visited nodes: y = sum over trees and levels of coefficient * weight row.
//
// Rows of x are taken in the order of their leaves, so that consecutive ones share most weight rows, and those at
// the same leaf share all of them in registers. Also the gradient of x, with other coefficients and weights.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int kSumBlock = 128;  // rows of one task
// Columns of one pass over those rows: a path's share of them stays in the first-level cache, so that neighbours read
// from there what they have in common.
constexpr int64_t kSumColumns = 256;
constexpr int64_t kCachedBytes = 512 << 10;  // a larger y is fetched ahead of its stores

template <class E>
struct PathSum {
  int64_t num_rows, trees, levels, nodes, width;
  int depth, threads;
  const typename E::type* weight;
  const float* coefficients;  // (N, P, levels)
  const uint32_t* leaves;     // (N, P)
  typename E::type* y;        // (N, width)
  bool streams;               // y is large
};

// The paths alone, with nothing to sum.
template <class E>
static PathSum<E> paths_of(const Shape& s, const void* weight, int64_t width, const uint32_t* leaves) {
  PathSum<E> p = {};
  p.num_rows = s.num_rows;
  p.trees = s.trees;
  p.levels = s.levels();
  p.nodes = s.nodes();
  p.width = width;
  p.depth = s.depth;
  p.threads = s.threads;
  p.weight = (const typename E::type*)weight;
  p.leaves = leaves;
  return p;
}

// Trees of depth 0 have one node that every row visits: they are summed as one tree with one path of P nodes.
template <class E>
static PathSum<E> path_sum(const Shape& s, const void* weight, int64_t width, const float* coefficients,
                           const uint32_t* leaves, void* y) {
  const bool flat = s.depth == 0;
  PathSum<E> p = paths_of<E>(s, weight, width, leaves);
  p.trees = flat ? 1 : s.trees;
  p.levels = flat ? s.trees : s.levels();
  p.coefficients = coefficients;
  p.y = (typename E::type*)y;
  p.streams = should_stream(y, s.num_rows, width * (int64_t)sizeof(typename E::type));
  return p;
}

// Rows of weights on the path to a leaf, from level `first` on.
template <class E>
FFF_INLINE void fill_path(const PathSum<E>& p, int64_t tree, uint32_t leaf, int64_t first,
                          const typename E::type** rows) {
  for (int64_t level = first; level < p.levels; ++level) {
    const int64_t node = p.depth == 0 ? level : tree * p.nodes + node_on_path(leaf, p.depth, level);
    rows[level] = p.weight + node * p.width;
  }
}

#if defined(FFF_ISA_AVX512)
constexpr int kPairs1 = 8, kPairs2 = 4, kPairs4 = 2;
#else
constexpr int kPairs1 = 4, kPairs2 = 2, kPairs4 = 1;
#endif

template <class E>
struct SumScratch {
  const typename E::type** path;
  float* wide;  // kSumBlock rows, for several trees only
};

// Sums columns [begin, end) of rows[0 .. count), all at the leaf of s.rows, a few at a time.
template <class E>
static void sum_leaf(const PathSum<E>& p, SumRows<E> s, int64_t tree, const int32_t* rows, float* const* wide,
                     int count, int64_t begin, int64_t end) {
  const float* coefficients[4];
  typename E::type* y[4];
  s.coefficients = coefficients;
  s.y = y;
  for (int i = 0; i < count;) {
    const int size = count - i >= 4 ? 4 : (count - i >= 2 ? 2 : 1);
    for (int t = 0; t < size; ++t) {
      coefficients[t] = p.coefficients + ((int64_t)rows[i + t] * p.trees + tree) * p.levels;
      y[t] = p.y + (int64_t)rows[i + t] * p.width;
    }
    s.wide = wide + i;
    if (size == 4)
      sum_rows<E, 4, kPairs4>(s, begin, end);
    else if (size == 2)
      sum_rows<E, 2, kPairs2>(s, begin, end);
    else
      sum_rows<E, 1, kPairs1>(s, begin, end);
    i += size;
  }
}

// Asks for columns [begin, end) of the weight rows on the path to `leaf` that the path to `before` does not have.
template <class E>
FFF_INLINE void prefetch_path(const PathSum<E>& p, int64_t tree, uint32_t leaf, uint32_t before, int64_t begin,
                              int64_t end) {
  for (int64_t level = first_difference(leaf, before, p.depth); level < p.levels; ++level)
    prefetch_row(p.weight + (tree * p.nodes + node_on_path(leaf, p.depth, level)) * p.width + begin,
                 (end - begin) * (int64_t)sizeof(typename E::type));
}

// One tree for `count` rows sorted by leaf; wide[i] belongs to rows[i].
template <class E>
static void sum_sorted(const PathSum<E>& p, const SumScratch<E>& scratch, int64_t tree, const int32_t* rows,
                       float* const* wide, int count) {
  const bool fetches_y = !p.streams && p.num_rows * p.width * (int64_t)sizeof(typename E::type) >= kCachedBytes;
  SumRows<E> s = {};
  s.rows = scratch.path;
  s.num_nodes = p.levels;
  s.first = tree == 0;
  s.last = tree == p.trees - 1;
  s.streams = p.streams;
  int starts[kSumBlock + 1], num_runs = 0;  // runs of rows at one leaf
  uint32_t leaves[kSumBlock];
  for (int i = 0; i < count; ++i) {
    const uint32_t leaf = p.leaves[rows[i] * p.trees + tree];
    if (num_runs > 0 && leaf == leaves[num_runs - 1]) continue;
    starts[num_runs] = i;
    leaves[num_runs++] = leaf;
  }
  starts[num_runs] = count;
  for (int64_t begin = 0; begin < p.width; begin += kSumColumns) {
    const int64_t end = min64(p.width, begin + kSumColumns);
    if (num_runs > 1) prefetch_path(p, tree, leaves[1], leaves[0], begin, end);
    for (int r = 0; r < num_runs; ++r) {
      const int64_t changed = r == 0 ? 0 : first_difference(leaves[r], leaves[r - 1], p.depth);
      fill_path(p, tree, leaves[r], changed, scratch.path);
      if (r + kAhead < num_runs) {
        prefetch_path(p, tree, leaves[r + kAhead], leaves[r + kAhead - 1], begin, end);
        if (fetches_y)
          for (int i = starts[r + kAhead]; i < starts[r + kAhead + 1]; ++i)
            prefetch_row(p.y + rows[i] * p.width + begin, (end - begin) * (int64_t)sizeof(typename E::type));
      }
      sum_leaf(p, s, tree, rows + starts[r], wide + starts[r], starts[r + 1] - starts[r], begin, end);
    }
  }
}

// All trees for a block of rows: the sums wait in float rows between trees, in the order of `rows`.
template <class E>
static void sum_block(const PathSum<E>& p, const SumScratch<E>& scratch, int32_t* rows, int32_t* spare, int count) {
  float* wide[kSumBlock];
  const int64_t padded = padded_width(p.width);
  const int32_t first = rows[0];  // several trees take blocks of consecutive rows
  for (int64_t tree = 0; tree < p.trees; ++tree) {
    if (p.trees > 1) {
      sort_by_key(rows, spare, count, p.leaves + tree, p.trees, p.depth);
      for (int i = 0; i < count; ++i) {
        const int32_t slot = rows[i] - first;
        wide[i] = scratch.wide + slot * padded;
      }
    }
    sum_sorted(p, scratch, tree, rows, wide, count);
    if (p.trees > 1)
      for (int i = 0; i < count; ++i) rows[i] = first + i;
  }
}

template <class E>
static Status sum_paths(const PathSum<E>& p) {
  const int64_t rows_per_task = min64(kSumBlock, max64(4, ceil_div(p.num_rows, 4 * p.threads)));
  const int64_t wide_size = p.trees > 1 ? kSumBlock * padded_width(p.width) : 0;
  Scratch<int32_t> rows(p.num_rows), spare(p.num_rows);
  Scratch<const typename E::type*> paths(p.threads * p.levels);
  Scratch<float> wide(max64(1, p.threads * wide_size));
  if (rows.missing() || spare.missing() || paths.missing() || wide.missing()) return kNoMemory;
  for (int64_t i = 0; i < p.num_rows; ++i) rows.data[i] = (int32_t)i;
  if (p.trees == 1) sort_by_key(rows.data, spare.data, p.num_rows, p.leaves, 1, p.depth);
  auto task = [&](int64_t i, int worker) {
    const int64_t begin = i * rows_per_task;
    const SumScratch<E> scratch = {paths.data + worker * p.levels, wide.data + worker * wide_size};
    sum_block(p, scratch, rows.data + begin, spare.data + begin, (int)min64(rows_per_task, p.num_rows - begin));
    if (p.streams) finish_streams();
  };
  parallel(p.threads, ceil_div(p.num_rows, rows_per_task), task);
  return kDone;
}

}  // namespace FFF_ISA
}  // namespace fff

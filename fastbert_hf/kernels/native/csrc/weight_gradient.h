// Gradients of the weights: row of a node = sum over the rows that visit it of coefficient * vector.
//
// Sorted by leaf, the visitors of every node of a tree are neighbours, at every level. So one pass over the sorted
// rows with one accumulator a level sums all nodes: when a row's path leaves a node, its sum is complete and is
// written, once. A task owns some columns of one tree's gradient and sums them over all rows, so the order is the
// same for every number of threads: within a segment of kSegment rows first, then segment after segment, which also
// keeps the rounding error of long sums small.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int kSegment = 512;

struct Run {  // rows of a segment at one leaf
  int32_t begin, end;
  uint32_t leaf;
  int first_new;  // first level whose node the run before did not visit
};

template <class E>
struct WeightGradient {
  int64_t num_rows, trees, levels, nodes, width;
  int depth;
  const int32_t* sorted;            // (P, N) rows by leaf
  const uint32_t* leaves;           // (N, P)
  const float* coefficients;        // (N, P, levels)
  const typename E::type* vectors;  // (N, width)
  typename E::type* gradient;       // (P*n, width)
  bool streams;                     // the gradient is large
};

#if defined(FFF_ISA_AVX512)
constexpr int kStripPairs = 2;
#else
constexpr int kStripPairs = 1;
#endif
constexpr int kStrip = kStripPairs * kPair;  // columns whose accumulators fit the registers, for six levels
constexpr int kLevelTile = 6;
constexpr int kVectorsAhead = 16;

// What one pass over a segment needs besides the problem.
struct Segment {
  const Run* runs;
  int num_runs;
  const int32_t* rows;  // of the segment, sorted
  int last_shared;      // levels below this one go on in the next segment
  int64_t tree;
};

// sum[l] += scale[l] * vector
template <class E, int L, int C, bool PARTIAL>
FFF_INLINE void add_vector(const typename E::type* vector, const float* scale, int n, vec (&sum)[L][2 * C]) {
  vec v[2 * C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    if constexpr (PARTIAL)
      E::load2_first(vector, n, &v[0], &v[1]);
    else
      E::load2(vector + c * kPair, &v[2 * c], &v[2 * c + 1]);
  }
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    const vec a = broadcast(scale[l]);
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) sum[l][c] = fma(a, v[c], sum[l][c]);
  }
}

template <class E, int C, bool PARTIAL>
FFF_INLINE void write_sum(typename E::type* out, const vec (&sum)[2 * C], bool streams, int n) {
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    if constexpr (PARTIAL)
      E::store2_first(out, sum[0], sum[1], n);
    else if (streams)
      E::stream2(out + c * kPair, sum[2 * c], sum[2 * c + 1]);
    else
      E::store2(out + c * kPair, sum[2 * c], sum[2 * c + 1]);
  }
}

// Levels [level, level + L) of one segment; carry[level][column] are sums of nodes that began in earlier segments.
template <class E, int L, int C, bool PARTIAL>
static __attribute__((noinline)) void sum_segment(const WeightGradient<E>& g, const Segment& segment, int64_t level,
                                                  int64_t column, int n, float* carry, int64_t carry_stride) {
  vec sum[L][2 * C];
  unsigned carried = 0;  // bit l: the node of level + l began in an earlier segment
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    if (level + l < segment.runs[0].first_new) carried |= 1u << l;
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) sum[l][c] = zero();
  }
  const int64_t visits = g.trees * g.levels, visit = segment.tree * g.levels + level;
  const typename E::type* vectors = g.vectors + column;
  const int32_t last_row = segment.runs[segment.num_runs - 1].end - 1;
  for (int r = 0; r < segment.num_runs; ++r) {
    const Run run = segment.runs[r];
    for (int32_t i = run.begin; i < run.end; ++i) {
      if (level == 0)  // later levels find the vectors in cache
        prefetch_row(vectors + segment.rows[min64(i + kVectorsAhead, last_row)] * g.width,
                     C * kPair * (int64_t)sizeof(typename E::type));
      const int64_t row = segment.rows[i];
      add_vector<E, L, C, PARTIAL>(vectors + row * g.width, g.coefficients + row * visits + visit, n, sum);
    }
    const bool ends = r + 1 == segment.num_runs;
    const int first_done = ends ? segment.last_shared : segment.runs[r + 1].first_new;
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      if (level + l < first_done && !ends) continue;
      float* kept = carry + (level + l) * carry_stride;
      if (carried >> l & 1u) {
#pragma GCC unroll 16
        for (int c = 0; c < 2 * C; ++c) sum[l][c] = add(load(kept + c * kWidth), sum[l][c]);
        carried &= ~(1u << l);
      }
      if (level + l < first_done) {  // the node goes on in the next segment
#pragma GCC unroll 16
        for (int c = 0; c < 2 * C; ++c) store(kept + c * kWidth, sum[l][c]);
        continue;
      }
      const int64_t node = segment.tree * g.nodes + node_on_path(run.leaf, g.depth, level + l);
      write_sum<E, C, PARTIAL>(g.gradient + node * g.width + column, sum[l], g.streams, n);
#pragma GCC unroll 16
      for (int c = 0; c < 2 * C; ++c) sum[l][c] = zero();
    }
  }
}

template <class E, int C, bool PARTIAL>
static void sum_levels(const WeightGradient<E>& g, const Segment& segment, int64_t column, int n, float* carry,
                       int64_t carry_stride) {
  int64_t level = 0;
  for (; level + kLevelTile <= g.levels; level += kLevelTile)
    sum_segment<E, kLevelTile, C, PARTIAL>(g, segment, level, column, n, carry, carry_stride);
  for (; level + 3 <= g.levels; level += 3)
    sum_segment<E, 3, C, PARTIAL>(g, segment, level, column, n, carry, carry_stride);
  for (; level < g.levels; ++level) sum_segment<E, 1, C, PARTIAL>(g, segment, level, column, n, carry, carry_stride);
}

// Columns [begin, end) of one tree. `runs` has room for kSegment of them, `carry` for levels * padded columns.
template <class E>
static void sum_columns(const WeightGradient<E>& g, int64_t tree, int64_t begin, int64_t end, Run* runs,
                        float* carry) {
  const int64_t carry_stride = padded_width(end - begin);
  const int32_t* sorted = g.sorted + tree * g.num_rows;
  uint32_t previous = 0;
  for (int64_t first = 0; first < g.num_rows; first += kSegment) {
    const int count = (int)min64(kSegment, g.num_rows - first);
    Segment segment = {runs, 0, sorted + first, 0, tree};
    for (int i = 0; i < count; ++i) {
      const uint32_t leaf = g.leaves[segment.rows[i] * g.trees + tree];
      if (i > 0 && leaf == previous) {
        runs[segment.num_runs - 1].end = i + 1;
        continue;
      }
      const int first_new =
          first + i == 0 ? 0 : (leaf == previous ? g.depth + 1 : first_difference(leaf, previous, g.depth));
      runs[segment.num_runs++] = {i, i + 1, leaf, first_new};
      previous = leaf;
    }
    if (first + count < g.num_rows) {
      const uint32_t next = g.leaves[segment.rows[count] * g.trees + tree];
      segment.last_shared = next == previous ? g.depth + 1 : first_difference(next, previous, g.depth);
    }
    int64_t column = begin;
    for (; column + kStrip <= end; column += kStrip)
      sum_levels<E, kStripPairs, false>(g, segment, column, 0, carry + column - begin, carry_stride);
    for (; column + kPair <= end; column += kPair)
      sum_levels<E, 1, false>(g, segment, column, 0, carry + column - begin, carry_stride);
    if (column < end)
      sum_levels<E, 1, true>(g, segment, column, (int)(end - column), carry + column - begin, carry_stride);
  }
}

}  // namespace FFF_ISA
}  // namespace fff

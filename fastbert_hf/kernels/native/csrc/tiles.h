// The arithmetic: small blocks of the three products, held in registers.
//
//   dot_tile    logits of several rows of x at one node            (the walk)
//   path_dots   products of several rows with several nodes        (gradient of the activations)
//   sum_tile    sum over nodes of coefficient * weight row         (y, gradient of x)
//
// The order in which one result is summed depends on the width alone, never on how many rows share a tile: a row's
// result is the same bit for bit whoever its neighbours are.
#pragma once

namespace fff {
namespace FFF_ISA {

// ---- logits: out[t] = <x[t], w> ----

template <class E, int T>
FFF_INLINE void dot_tile(const typename E::type* w, const typename E::type* const* x, int64_t width, float* out) {
  vec sum[T][4];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
    for (int a = 0; a < 4; ++a) sum[t][a] = zero();
  int64_t i = 0;
  for (; i + 2 * kPair <= width; i += 2 * kPair) {
    vec w0, w1, w2, w3;
    E::load2(w + i, &w0, &w1);
    E::load2(w + i + kPair, &w2, &w3);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      vec x0, x1, x2, x3;
      E::load2(x[t] + i, &x0, &x1);
      E::load2(x[t] + i + kPair, &x2, &x3);
      sum[t][0] = fma(w0, x0, sum[t][0]);
      sum[t][1] = fma(w1, x1, sum[t][1]);
      sum[t][2] = fma(w2, x2, sum[t][2]);
      sum[t][3] = fma(w3, x3, sum[t][3]);
    }
  }
  for (; i < width; i += kPair) {
    const int n = (int)min64(width - i, kPair);
    vec w0, w1;
    E::load2_first(w + i, n, &w0, &w1);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      vec x0, x1;
      E::load2_first(x[t] + i, n, &x0, &x1);
      sum[t][0] = fma(w0, x0, sum[t][0]);
      sum[t][1] = fma(w1, x1, sum[t][1]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) out[t] = sum_lanes(add(add(sum[t][0], sum[t][1]), add(sum[t][2], sum[t][3])));
}

// ---- products with a path: out[t * stride + l] = <v[t], rows[l]> ----

template <class E, int T, int L>
FFF_INLINE void path_dots(const typename E::type* const* rows, const typename E::type* const* v, int64_t width,
                          float* out, int64_t stride) {
  vec sum[T][L];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sum[t][l] = zero();
  for (int64_t i = 0; i < width; i += kPair) {
    const bool partial = width - i < kPair;
    const int n = (int)(width - i);
    vec v0[T], v1[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      if (partial)
        E::load2_first(v[t] + i, n, &v0[t], &v1[t]);
      else
        E::load2(v[t] + i, &v0[t], &v1[t]);
    }
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      vec w0, w1;
      if (partial)
        E::load2_first(rows[l] + i, n, &w0, &w1);
      else
        E::load2(rows[l] + i, &w0, &w1);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[t][l] = fma(w1, v1[t], fma(w0, v0[t], sum[t][l]));
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) out[t * stride + l] = sum_lanes(sum[t][l]);
}

// ---- weighted sums of rows: y[t] = (start[t] or 0) + sum_k coefficients[t][k] * rows[k] ----

// `wide` rows carry float sums from one tree to the next: read unless `first`, written instead of y unless `last`.
template <class E>
struct SumRows {
  const typename E::type* const* rows;
  int64_t num_nodes;
  const float* const* coefficients;
  float* const* wide;
  typename E::type* const* y;
  bool first, last;
  bool streams;
  int64_t next;  // rows to ask for while these are summed: the pointers to them follow
};

// columns [column, column + C * kPair) of T rows, or the first n of them when C = 1 and n < kPair
template <class E, int T, int C, bool PARTIAL>
FFF_INLINE void sum_tile(const SumRows<E>& s, int64_t column, int n) {
  vec sum[T][2 * C];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) sum[t][c] = s.first ? zero() : load(s.wide[t] + column + c * kWidth);
  for (int64_t k = 0; k < s.num_nodes; ++k) {
    const typename E::type* row = s.rows[k] + column;
    if (k < s.next) prefetch_row(s.rows[k + s.num_nodes] + column, C * kPair * (int64_t)sizeof(typename E::type));
    vec w[2 * C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      if constexpr (PARTIAL)
        E::load2_first(row, n, &w[0], &w[1]);
      else
        E::load2(row + c * kPair, &w[2 * c], &w[2 * c + 1]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const vec scale = broadcast(s.coefficients[t][k]);
#pragma GCC unroll 16
      for (int c = 0; c < 2 * C; ++c) sum[t][c] = fma(scale, w[c], sum[t][c]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      if (!s.last)
        F32::store2(s.wide[t] + column + c * kPair, sum[t][2 * c], sum[t][2 * c + 1]);
      else if constexpr (PARTIAL)
        E::store2_first(s.y[t] + column, sum[t][2 * c], sum[t][2 * c + 1], n);
      else if (s.streams)
        E::stream2(s.y[t] + column + c * kPair, sum[t][2 * c], sum[t][2 * c + 1]);
      else
        E::store2(s.y[t] + column + c * kPair, sum[t][2 * c], sum[t][2 * c + 1]);
    }
}

// columns [begin, end) of T rows
template <class E, int T, int C>
static __attribute__((noinline)) void sum_rows(const SumRows<E>& s, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + C * kPair <= end; column += C * kPair) sum_tile<E, T, C, false>(s, column, kPair);
  for (; column + kPair <= end; column += kPair) sum_tile<E, T, 1, false>(s, column, kPair);
  if (column < end) sum_tile<E, T, 1, true>(s, column, (int)(end - column));
}

}  // namespace FFF_ISA
}  // namespace fff

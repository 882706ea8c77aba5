// Products of a group of rows with a block of weight rows: what a leaf computes for the rows that chose it.
//
//   row_products   out[i][j] = <a[i], b row j>          both read along their rows: nothing is packed or transposed
//   weighted_rows  y[i] += sum_k coefficients[i][k] * b row k
//
// As in tiles.h, the order in which one result is summed depends on the lengths alone, never on the rows beside it.
#pragma once

namespace fff {
namespace FFF_ISA {

// ---- row products ----

#if defined(FFF_ISA_AVX512)
constexpr int kProductRows = 6;
#else
constexpr int kProductRows = 3;
#endif

// Rows whose elements lie as E::load2 hands them out, so that a float row meets a bfloat16 one lane by lane.
template <class E>
static void widen_row(const typename E::type* row, int64_t width, float* wide) {
  int64_t i = 0;
  vec a, b;
  for (; i + kPair <= width; i += kPair) {
    E::load2(row + i, &a, &b);
    F32::store2(wide + i, a, b);
  }
  if (i < width) {
    E::load2_first(row + i, (int)(width - i), &a, &b);
    F32::store2(wide + i, a, b);
  }
}

constexpr int64_t kProductColumns = 448;  // of one pass: what stays of b in the first-level cache is below 24 kB
constexpr int64_t kProductBlock = 12;     // rows of b of one pass

// One tile of products: out[t * stride + l] = <a[t], b + l * width>. Long rows come in several passes over columns
// [begin, end), between which the sums of the lanes wait in `partial`. Rows a are widened where E::kWidens.
struct Pass {
  int64_t width, begin, end;
  bool first, last;
  int64_t ahead;      // bytes by which a tile asks for b before it is read; 0: not at all
  const char* b_end;  // of all rows of b
};

template <class E, int T, int L>
static __attribute__((noinline)) void product_tile(const typename E::factor* const* a, const typename E::type* b,
                                                   const Pass& pass, vec* partial, float* out, int64_t stride) {
  const int64_t width = pass.width;
  vec sum[T][L];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sum[t][l] = pass.first ? zero() : partial[t * L + l];
  int64_t i = pass.begin;
  for (; i + kPair <= pass.end; i += kPair) {
    if (pass.ahead) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l)
        prefetch_row((const char*)(b + l * width + i) + pass.ahead, kPair * (int64_t)sizeof(typename E::type));
    }
    if constexpr (!E::kWidens) {
#pragma GCC unroll 2
      for (int64_t j = i; j < i + kPair; j += E::kLanes) {
        decltype(E::load_lanes(b)) v[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) v[t] = in_register(E::load_lanes(a[t] + j));
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          const auto w = E::load_lanes(b + l * width + j);
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) sum[t][l] = E::multiply_add(w, v[t], sum[t][l]);
        }
      }
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        vec w0, w1;
        E::load2(b + l * width + i, &w0, &w1);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) sum[t][l] = fma(w1, load(a[t] + i + kWidth), fma(w0, load(a[t] + i), sum[t][l]));
      }
    }
  }
  if (i < pass.end) {  // the last columns of the rows
    const int n = (int)(pass.end - i);
    if constexpr (!E::kWidens) {
#pragma GCC unroll 2
      for (int j = 0; j < kPair; j += E::kLanes)
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          const auto w = E::load_lanes_first(b + l * width + i + j, n - j);
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t)
            sum[t][l] = E::multiply_add(w, E::load_lanes_first(a[t] + i + j, n - j), sum[t][l]);
        }
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        vec w0, w1;
        E::load2_first(b + l * width + i, n, &w0, &w1);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) sum[t][l] = fma(w1, load(a[t] + i + kWidth), fma(w0, load(a[t] + i), sum[t][l]));
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    if (!pass.last) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) partial[t * L + l] = sum[t][l];
    } else if constexpr (L % 4 == 0) {
#pragma GCC unroll 4
      for (int l = 0; l < L; l += 4)
        sum_lanes4(sum[t][l], sum[t][l + 1], sum[t][l + 2], sum[t][l + 3], out + t * stride + l);
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) out[t * stride + l] = sum_lanes(sum[t][l]);
    }
  }
}

// Rows of the next tile. Two tiles of 2 are quicker than one of 3 and one of 1.
FFF_INLINE int tile_rows(int64_t remaining) {
  if (remaining >= kProductRows && remaining != kProductRows + 1) return kProductRows;
  if (kProductRows > 4 && remaining >= 4) return 4;
  return remaining == 4 || remaining >= kProductRows ? 2 : (int)remaining;
}

template <class E, int L>
static void product_rows(const typename E::factor* const* a, int rows, const typename E::type* b, const Pass& pass,
                         vec* partial, float* out, int64_t stride) {
#if defined(FFF_ISA_AVX512)
  if (rows == 6) return product_tile<E, 6, L>(a, b, pass, partial, out, stride);
  if (rows == 4) return product_tile<E, 4, L>(a, b, pass, partial, out, stride);
#endif
  if (rows == 3) return product_tile<E, 3, L>(a, b, pass, partial, out, stride);
  if (rows == 2) return product_tile<E, 2, L>(a, b, pass, partial, out, stride);
  product_tile<E, 1, L>(a, b, pass, partial, out, stride);
}

// Asks for what is read of b a little later, so that it comes from memory while this is computed: the processor's own
// prefetching stops at every page. Where memory decides, tiles ask for each line kBytesAhead early, and near the end
// of b for what lies behind it, the next leaf as a rule. Otherwise rows are asked for one block early, piece by
// piece.
constexpr int64_t kBytesAhead = 24 << 10;
template <class E>
FFF_INLINE void fetch_ahead(const typename E::type* b, int64_t rows, const Pass& pass) {
  constexpr int64_t kSize = sizeof(typename E::type);
  if (pass.ahead) return;
  for (int64_t row = kProductBlock; row < kProductBlock + rows; ++row) {
    const typename E::type* from = b + row * pass.width + pass.begin;
    if ((const char*)from < pass.b_end) prefetch_row(from, (pass.end - pass.begin) * kSize);
  }
}

// Rows [0, b_rows) of b, at most kProductBlock, for all rows of `a`.
template <class E>
static void product_block(const typename E::factor* const* a, int64_t count, const typename E::type* b,
                          int64_t b_rows, const Pass& pass, vec* partial, float* out, int64_t stride) {
  for (int64_t i = 0; i < count;) {
    const int rows = tile_rows(count - i);
    float* to = out + i * stride;
    int64_t j = 0;
    if (rows == 1)
      for (; j + 8 <= b_rows; j += 8, partial += 8) {
        if (i == 0) fetch_ahead<E>(b + j * pass.width, 8, pass);
        product_tile<E, 1, 8>(a + i, b + j * pass.width, pass, partial, to + j, stride);
      }
    for (; j + 4 <= b_rows; j += 4, partial += 4 * rows) {
      if (i == 0) fetch_ahead<E>(b + j * pass.width, 4, pass);
      product_rows<E, 4>(a + i, rows, b + j * pass.width, pass, partial, to + j, stride);
    }
    for (; j < b_rows; ++j, partial += rows)
      product_rows<E, 1>(a + i, rows, b + j * pass.width, pass, partial, to + j, stride);
    i += rows;
  }
}

// out[i * stride + j] = <a[i], b + j * width> for i < count <= kProductsAtOnce and j < b_rows. A few pieces of b's
// rows at a time stay in the first-level cache while all rows of `a` pass by.
constexpr int64_t kProductsAtOnce = 64;
constexpr int64_t kFewRows = 6;  // up to here weights are read once, so that memory decides

template <class E>
static void row_products(const typename E::factor* const* a, int64_t count, const typename E::type* b, int64_t b_rows,
                         int64_t width, float* out, int64_t stride) {
  vec partial[kProductsAtOnce * kProductBlock];
  const int64_t passes = count <= kFewRows ? 1 : max64(1, ceil_div(width, kProductColumns));
  const int64_t columns = ceil_div(ceil_div(width, passes), kPair) * kPair;
  const int64_t block = count == 1 ? 8 : kProductBlock;
  for (int64_t j = 0; j < b_rows; j += block)
    for (int64_t begin = 0; begin == 0 || begin < width; begin += columns) {
      const Pass pass = {width,
                         begin,
                         min64(width, begin + columns),
                         begin == 0,
                         begin + columns >= width,
                         count <= kFewRows ? kBytesAhead : 0,
                         (const char*)(b + b_rows * width)};
      product_block<E>(a, count, b + j * width, min64(block, b_rows - j), pass, partial, out + j, stride);
      if (columns == 0) break;
    }
}

// ---- weighted sums of rows ----

// y[i] = (first ? 0 : wide[i]) + sum over k of coefficients[i * stride + k] * b row k, for i < count.
template <class E>
struct WeightedRows {
  const typename E::type* const* b;  // rows of `width` elements
  int64_t b_rows, width;
  const float* coefficients;
  int64_t stride;
  float* const* wide;  // padded rows as E::load2 orders them; read unless `first`, written instead of y unless `last`
  typename E::type* const* y;
  bool first, last, streams;
};

constexpr int kSumRows = 6;  // rows of a full tile
// Rows of b between two visits to the same columns of y: so many pieces of rows that lie a multiple of the cache's
// way apart stay in it together. Where memory decides, so few that the next ones are asked for soon.
constexpr int64_t kSumDepth = 48, kFewSumDepth = 16;

// One tile of `size` rows of y, columns [begin, end), of `b_rows` rows of b; it asks for the `next` rows after them.
template <class E>
static void sum_some(const WeightedRows<E>& p, const typename E::type* const* b, int64_t b_rows, int64_t next,
                     const float* coefficients, int64_t i, int size, bool first, bool last, int64_t begin,
                     int64_t end) {
  const float* scales[kSumRows];
  for (int t = 0; t < size; ++t) scales[t] = coefficients + (i + t) * p.stride;
  const SumRows<E> s = {b, b_rows, scales, p.wide + i, p.y + i, first, last, p.streams, next};
  switch (size) {
    case 6:
      return sum_rows<E, 6, kPairs4>(s, begin, end);
    case 5:
      return sum_rows<E, 5, kPairs4>(s, begin, end);
    case 4:
      return sum_rows<E, 4, kPairs4>(s, begin, end);
    case 3:
      return sum_rows<E, 3, kPairs4>(s, begin, end);
    case 2:
      return sum_rows<E, 2, kPairs2>(s, begin, end);
    default:
      return sum_rows<E, 1, kPairs1>(s, begin, end);
  }
}

// Columns [begin, end). b is read once, in order, a few rows at a time, while the sums wait in `wide` rows. Several
// rows of y go through those in pieces of a tile's columns; the first tile asks for the same piece of the rows after.
template <class E>
static void sum_weighted_rows(const WeightedRows<E>& p, int64_t count, int64_t begin, int64_t end) {
  const int64_t columns = count > 2 ? kPairs4 * kPair : end - begin;
  const int64_t depth = count > kSumRows ? kSumDepth : kFewSumDepth;
  for (int64_t k = 0; k < p.b_rows; k += depth) {
    const int64_t rows = min64(depth, p.b_rows - k), next = min64(rows, p.b_rows - k - rows);
    const bool first = p.first && k == 0, last = p.last && k + rows == p.b_rows;
    for (int64_t column = begin; column < end; column += columns) {
      const int64_t stop = min64(end, column + columns);
      for (int64_t i = 0; i < count; i += kSumRows)
        sum_some(p, p.b + k, rows, i == 0 ? next : 0, p.coefficients + k, i, (int)min64(kSumRows, count - i), first,
                 last, column, stop);
    }
  }
}

}  // namespace FFF_ISA
}  // namespace fff

// Self-attention of an encoder: y = softmax(scale * Q K^T) V for every text and head, keys that are not visible left
// out. Elements are widened to float32 as they are read, and everything is computed in float32.
//
// One task is one text and head. Its keys are transposed and its values copied once, so that both products run along
// vectors: a few queries with up to kAttentionVectors vectors of keys (then of columns of V) at a time. Meanwhile it
// asks for the next head's rows. The scores of
// those queries, a row of T floats each, stay in the first cache between the two products.
#pragma once

namespace fff {
namespace FFF_ISA {

// Queries of a tile and vectors beside them: their sums fill the registers.
#if defined(FFF_ISA_AVX512)
constexpr int kQueries = 6, kAttentionVectors = 4;
#else
constexpr int kQueries = 6, kAttentionVectors = 2;
#endif
constexpr int64_t kKeyBlock = 16;  // keys come in blocks of as many, on every instruction set

// out[r][j] = sum over k < count of a[r][k] * b[k][j], for R rows and L vectors.
template <int R, int L>
FFF_INLINE void attention_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                               float* out, int64_t out_stride) {
  vec sum[R][L];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sum[r][l] = zero();
  for (int64_t k = 0; k < count; ++k) {
    vec v[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) v[l] = load(b + k * b_stride + l * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec from = broadcast(a[r * a_stride + k]);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) sum[r][l] = fma(from, v[l], sum[r][l]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) store(out + r * out_stride + l * kWidth, sum[r][l]);
}

// The same for any number of columns, a multiple of kWidth.
template <int R>
static void attention_rows(const float* a, int64_t a_stride, const float* b, int64_t columns, int64_t count,
                           float* out) {
  int64_t j = 0;
  for (; j + kAttentionVectors * kWidth <= columns; j += kAttentionVectors * kWidth)
    attention_tile<R, kAttentionVectors>(a, a_stride, b + j, columns, count, out + j, columns);
  for (; j + 2 * kWidth <= columns; j += 2 * kWidth)
    attention_tile<R, 2>(a, a_stride, b + j, columns, count, out + j, columns);
  for (; j < columns; j += kWidth) attention_tile<R, 1>(a, a_stride, b + j, columns, count, out + j, columns);
}

// out (rows, columns) = a (rows, count) b (count, columns), for 1 <= rows <= kQueries.
static void attention_product(int rows, const float* a, int64_t a_stride, const float* b, int64_t columns,
                              int64_t count, float* out) {
  if (rows == 6) return attention_rows<6>(a, a_stride, b, columns, count, out);
  if (rows == 5) return attention_rows<5>(a, a_stride, b, columns, count, out);
  if (rows == 4) return attention_rows<4>(a, a_stride, b, columns, count, out);
  if (rows == 3) return attention_rows<3>(a, a_stride, b, columns, count, out);
  if (rows == 2) return attention_rows<2>(a, a_stride, b, columns, count, out);
  attention_rows<1>(a, a_stride, b, columns, count, out);
}

// Scores of one query become e^(score - largest), zero behind the keys; returns 1 / their sum. Loops over sixteen
// lanes, which compilers turn into vectors; the order of sums is the same on every instruction set.
static float soften(float* __restrict scores, const uint8_t* __restrict visible, int64_t tokens, int64_t padded) {
  if (visible)
    for (int64_t i = 0; i < tokens; ++i) scores[i] = visible[i] ? scores[i] : -__builtin_inff();
  for (int64_t i = tokens; i < padded; ++i) scores[i] = -__builtin_inff();
  float largest[kKeyBlock], sums[kKeyBlock];
  for (int j = 0; j < kKeyBlock; ++j) largest[j] = scores[j], sums[j] = 0.0f;
  for (int64_t i = kKeyBlock; i < padded; i += kKeyBlock)
    for (int j = 0; j < kKeyBlock; ++j) largest[j] = scores[i + j] > largest[j] ? scores[i + j] : largest[j];
  for (int step = kKeyBlock / 2; step; step /= 2)
    for (int j = 0; j < step; ++j) largest[j] = largest[j + step] > largest[j] ? largest[j + step] : largest[j];
  for (int64_t i = 0; i < padded; i += kKeyBlock)
    for (int j = 0; j < kKeyBlock; ++j) {
      const float e = exponential(scores[i + j] - largest[0]);
      scores[i + j] = e;
      sums[j] += e;
    }
  for (int step = kKeyBlock / 2; step; step /= 2)
    for (int j = 0; j < step; ++j) sums[j] += sums[j + step];
  return 1.0f / sums[0];
}

FFF_INLINE void narrow_row(const float* in, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i] * factor;
}
FFF_INLINE void narrow_row(const float* in, float factor, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float a = in[i] * factor;
    uint32_t word;
    memcpy(&word, &a, 4);
    out[i] = a != a ? 0x7fc0 : (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
}

// Four floats each, which every instruction set has.
typedef float Four __attribute__((vector_size(16)));
FFF_INLINE Four four_of(const float* p) {
  Four a;
  memcpy(&a, p, sizeof a);
  return a;
}
FFF_INLINE Four four_of(const uint16_t* p) {
  return Four{BF16::widen(p[0]), BF16::widen(p[1]), BF16::widen(p[2]), BF16::widen(p[3])};
}
// elements of a (0 to 3) and b (4 to 7), chosen by number
template <int I, int J, int K, int L>
FFF_INLINE Four pick(Four a, Four b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I, J, K, L);
#else
  typedef int32_t Numbers __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Numbers{I, J, K, L});
#endif
}

// out[k * padded + i] = rows[i * stride + k] for i < count and k < dim, zeros up to `padded`, a multiple of 4.
template <class E>
static void transpose_rows(const typename E::type* rows, int64_t stride, int64_t count, int64_t dim, float* out,
                           int64_t padded) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const typename E::type* from = rows + i * stride;
    int64_t k = 0;
    for (; k + 4 <= dim; k += 4) {
      const Four a = four_of(from + k), b = four_of(from + stride + k), c = four_of(from + 2 * stride + k),
                 d = four_of(from + 3 * stride + k);
      const Four ab0 = pick<0, 4, 1, 5>(a, b), ab2 = pick<2, 6, 3, 7>(a, b);
      const Four cd0 = pick<0, 4, 1, 5>(c, d), cd2 = pick<2, 6, 3, 7>(c, d);
      const Four to[4] = {pick<0, 1, 4, 5>(ab0, cd0), pick<2, 3, 6, 7>(ab0, cd0), pick<0, 1, 4, 5>(ab2, cd2),
                          pick<2, 3, 6, 7>(ab2, cd2)};
      for (int j = 0; j < 4; ++j) memcpy(out + (k + j) * padded + i, to + j, sizeof(Four));
    }
    for (; k < dim; ++k)
      for (int64_t j = 0; j < 4; ++j) out[k * padded + i + j] = E::widen(from[j * stride + k]);
  }
  for (; i < padded; ++i)
    for (int64_t k = 0; k < dim; ++k) out[k * padded + i] = i < count ? E::widen(rows[i * stride + k]) : 0.0f;
}

static int64_t whole_vectors(int64_t count, int64_t lanes) { return ceil_div(count, lanes) * lanes; }

// Scratch memory of one thread.
struct AttentionMemory {
  int64_t keys, values, queries, scores, outputs, all;
  explicit AttentionMemory(const AttentionShape& s) {
    const int64_t padded = whole_vectors(s.tokens, kKeyBlock), columns = whole_vectors(s.head_dim, kWidth);
    keys = 0;
    values = keys + s.head_dim * padded;
    queries = values + s.tokens * columns;
    scores = queries + kQueries * whole_vectors(s.head_dim, kKeyBlock);
    outputs = scores + kQueries * padded;
    all = outputs + kQueries * columns;
  }
};

template <class E>
static void attend(const AttentionShape& s, const AttentionTensors& t, int64_t text, int64_t head, float* memory) {
  const bool fetches = head + 1 < s.heads;
  typedef typename E::type T;
  const AttentionMemory at(s);
  const int64_t tokens = s.tokens, dim = s.head_dim, width = s.heads * dim, stride = 3 * width;
  const int64_t padded = whole_vectors(tokens, kKeyBlock), columns = whole_vectors(dim, kWidth);
  const T* query = (const T*)t.query_key_value + text * tokens * stride + head * dim;
  const T *key = query + width, *value = key + width;
  float *keys = memory + at.keys, *values = memory + at.values, *queries = memory + at.queries;
  float *scores = memory + at.scores, *outputs = memory + at.outputs;
  transpose_rows<E>(key, stride, tokens, dim, keys, padded);
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t k = 0; k < dim; ++k) values[i * columns + k] = E::widen(value[i * stride + k]);
    for (int64_t k = dim; k < columns; ++k) values[i * columns + k] = 0.0f;
  }
  const uint8_t* visible = t.visible ? t.visible + text * tokens : nullptr;
  if (visible && !memchr(visible, 1, tokens)) visible = nullptr;  // a query that sees none sees all
  for (int64_t first = 0, rows; first < tokens; first += rows) {
    rows = min64(kQueries, tokens - first);
    if (fetches)
      for (int64_t i = first; i < first + rows; ++i)
        for (int64_t part = 0; part < 3; ++part)
          prefetch_row(query + i * stride + part * width + dim, dim * (int64_t)sizeof(T));
    float inverse[kQueries];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < dim; ++k) queries[r * dim + k] = E::widen(query[(first + r) * stride + k]) * s.scale;
    attention_product((int)rows, queries, dim, keys, padded, dim, scores);
    for (int64_t r = 0; r < rows; ++r) inverse[r] = soften(scores + r * padded, visible, tokens, padded);
    attention_product((int)rows, scores, padded, values, columns, tokens, outputs);
    for (int64_t r = 0; r < rows; ++r)
      narrow_row(outputs + r * columns, inverse[r], dim, (T*)t.y + (text * tokens + first + r) * width + head * dim);
  }
}

template <class E>
static Status attention(const AttentionShape& s, const AttentionTensors& t) {
  const int64_t floats = whole_vectors(AttentionMemory(s).all, 16);
  Scratch<float> memory(s.threads * floats);
  if (memory.missing()) return kNoMemory;
  auto task = [&](int64_t i, int worker) {
    attend<E>(s, t, i / s.heads, i % s.heads, memory.data + worker * floats);
  };
  parallel(s.threads, s.texts * s.heads, task);
  return kDone;
}

}  // namespace FFF_ISA
}  // namespace fff

// Self-attention with int8 linear layers around it: y = W_out attention(W_in x), both layers as int8_linear computes
// them. A call goes through its texts a few at a time, so that queries, keys and values stay in a core's caches.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int64_t kAttentionBytes = 384 << 10;  // of queries, keys and values for each thread, or one text's

template <class E>
static Status int8_attention(const AttentionShape& s, const Int8AttentionTensors& t, Int8Products products) {
  typedef typename E::type T;
  const int64_t width = s.heads * s.head_dim, joined = 3 * width, bytes = s.tokens * joined * (int64_t)sizeof(T);
  const int64_t texts = max64(1, min64(s.texts, s.threads * kAttentionBytes / bytes));
  Scratch<T> between(texts * s.tokens * joined), mixed(texts * s.tokens * width);
  if (between.missing() || mixed.missing()) return kNoMemory;
  Status status = kDone;
  for (int64_t text = 0; text < s.texts && status == kDone; text += texts) {
    AttentionShape part = s;
    part.texts = min64(texts, s.texts - text);
    const int64_t row = text * s.tokens, rows = part.texts * s.tokens;
    status =
        int8_linear<E>({rows, width, joined, s.threads}, {(const T*)t.x + row * width, t.in, between.data}, products);
    if (status == kDone)
      status = attention<E>(part, {between.data, t.visible ? t.visible + row : nullptr, mixed.data});
    if (status == kDone)
      status = int8_linear<E>({rows, width, width, s.threads}, {mixed.data, t.out, (T*)t.y + row * width}, products);
  }
  return status;
}

}  // namespace FFF_ISA
}  // namespace fff

// The op's forward pass: walk, activate, sum.
#pragma once

namespace fff {
namespace FFF_ISA {

// visited[level] = node of that level on the way to the leaf
static void write_path(uint32_t leaf, int depth, int32_t* visited) {
  for (int level = 0; level <= depth; ++level) visited[level] = (int32_t)node_on_path(leaf, depth, level);
}

// A few rows, one after the other: no sorting, no groups. The sums are formed in the same order as for many rows.
template <class E>
static Status forward_few(const Shape& s, const ForwardTensors& tensors) {
  typedef const typename E::type* In;
  constexpr int64_t kOnStack = 64;
  const int64_t visits = s.visits(), out_bytes = s.out_width * (int64_t)sizeof(typename E::type);
  const int64_t in_bytes = s.in_width * (int64_t)sizeof(typename E::type);
  float few_coefficients[kOnStack];
  In few_rows[kOnStack];
  Scratch<float> many_coefficients(visits > kOnStack ? visits : 0);
  Scratch<In> many_rows(visits > kOnStack ? visits : 0);
  if (visits > kOnStack && (many_coefficients.missing() || many_rows.missing())) return kNoMemory;
  float* coefficients = visits > kOnStack ? many_coefficients.data : few_coefficients;
  In* rows = visits > kOnStack ? many_rows.data : few_rows;
  for (int64_t i = 0; i < s.num_rows; ++i) {
    In x = (In)tensors.x + i * s.in_width;
    float* logits = tensors.logits ? tensors.logits + i * visits : coefficients;
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      uint32_t node = 0;
      for (int level = 0; level <= s.depth; ++level) {
        const int64_t row = tree * s.nodes() + ((int64_t)1 << level) - 1 + node;
        const int64_t visit = tree * s.levels() + level;
        rows[visit] = (In)tensors.weight_out + row * s.out_width;
        const int64_t first_child = tree * s.nodes() + ((int64_t)2 << level) - 1 + 2 * (int64_t)node;
        if (level < s.depth)  // both children are neighbours: the one that is needed is on its way before it is known
          prefetch_row((In)tensors.weight_in + first_child * s.in_width, 2 * in_bytes);
        float logit;
        dot_tile<E, 1>((In)tensors.weight_in + row * s.in_width, &x, s.in_width, &logit);
        if (tensors.bias_in) logit += E::widen(((In)tensors.bias_in)[row]);
        logits[visit] = logit;
        prefetch_row(rows[visit], out_bytes);
        if (level < s.depth) node = 2 * node + (logit > 0.0f);
      }
      if (tensors.visited) write_path(node, s.depth, tensors.visited + i * visits + tree * s.levels());
    }
    activate(s.activation, logits, coefficients, visits);
    typename E::type* y = (typename E::type*)tensors.y + i * s.out_width;
    SumRows<E> sum = {};
    sum.rows = rows;
    sum.num_nodes = visits;
    sum.coefficients = &coefficients;
    sum.y = &y;
    sum.first = sum.last = true;
    sum_rows<E, 1, kPairs1>(sum, 0, s.out_width);
  }
  return kDone;
}

// As many rows as the scratch memory allows, in groups.
template <class E>
static Status forward_chunk(const Shape& s, const ForwardTensors& tensors) {
  typedef const typename E::type* In;
  const int64_t visits = s.visits();
  Scratch<float> coefficients(s.num_rows * visits);
  Scratch<uint32_t> leaves(s.num_rows * s.trees);
  if (coefficients.missing() || leaves.missing()) return kNoMemory;
  float* logits = tensors.logits ? tensors.logits : coefficients.data;
  const Walk<E> w = {&s, (In)tensors.x, (In)tensors.weight_in, (In)tensors.bias_in, logits, leaves.data};
  Status status = walk(w);
  if (status != kDone) return status;
  const int64_t slice = 256;
  auto activate_slice = [&](int64_t i, int) {
    const int64_t begin = i * slice, count = min64(slice, s.num_rows - begin);
    activate(s.activation, logits + begin * visits, coefficients.data + begin * visits, count * visits);
    if (tensors.visited)
      for (int64_t path = begin * s.trees; path < (begin + count) * s.trees; ++path)
        write_path(leaves.data[path], s.depth, tensors.visited + path * s.levels());
  };
  parallel(s.threads, ceil_div(s.num_rows, slice), activate_slice);
  return sum_paths(path_sum<E>(s, tensors.weight_out, s.out_width, coefficients.data, leaves.data, tensors.y));
}

template <class E>
static Status forward(const Shape& s, const ForwardTensors& tensors) {
  if (s.num_rows <= 2) return forward_few<E>(s, tensors);
  const int64_t visits = s.visits(), bytes_per_row = 4 * (visits + 4 * s.trees);
  auto advance = [&](ForwardTensors* slice, int64_t begin) {
    if (slice->visited) slice->visited += begin * visits;
    if (slice->logits) slice->logits += begin * visits;
  };
  return by_chunks<E>(s, tensors, bytes_per_row, kBlock, advance, forward_chunk<E>);
}

}  // namespace FFF_ISA
}  // namespace fff

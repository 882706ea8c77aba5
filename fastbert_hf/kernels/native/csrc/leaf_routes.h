// Which leaf each row takes in each tree, and how certain the least certain decision was.
//
// The routers of a leaf tree are a tree of single neurons with the thresholds' negatives as biases, so the walk of
// the published form finds them; only the last decision is left to do.
#pragma once

namespace fff {
namespace FFF_ISA {

// Where a row went in one tree. With no decision at all the margin is infinite: the confidence is then 1.
struct Route {
  int32_t leaf;     // 0 .. 2^depth - 1, from the left
  int32_t decider;  // router of the least certain decision, numbered inside its tree; the first of equals
  float margin;     // its logit
};

FFF_INLINE float confidence_of(float margin) { return sigmoid(margin < 0.0f ? -margin : margin); }

// Routes from the logits along a path to router `last` of the deepest level, counted from its left.
static Route read_route(const float* logits, int depth, uint32_t last) {
  if (depth == 0) return {0, 0, __builtin_inff()};
  Route route = {(int32_t)(2 * last + (logits[depth - 1] > 0.0f)), 0, logits[0]};
  for (int level = 1; level < depth; ++level) {
    const float best = __builtin_fabsf(route.margin), found = __builtin_fabsf(logits[level]);
    if (best != best) break;      // NaN stays, as in a minimum
    if (found >= best) continue;  // false for NaN
    route.margin = logits[level];
    route.decider = (int32_t)node_on_path((uint32_t)route.leaf, depth, level);
  }
  return route;
}

// The thresholds with their signs changed, as the walk's biases.
template <class E>
static void negate(const typename E::type* in, int64_t count, typename E::type* out) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (E::kIsFloat)
      out[i] = -in[i];
    else
      out[i] = in[i] ^ 0x8000;
  }
}

template <class E>
static Route route_row(const LeafShape& s, const typename E::type* x, const typename E::type* router,
                       const typename E::type* threshold) {
  float logits[32];
  uint32_t node = 0;
  for (int level = 0; level < s.depth; ++level) {
    const int64_t row = ((int64_t)1 << level) - 1 + node;
    const int64_t first_child = ((int64_t)2 << level) - 1 + 2 * (int64_t)node;
    if (level + 1 < s.depth)
      prefetch_row(router + first_child * s.in_width, 2 * s.in_width * (int64_t)sizeof(typename E::type));
    dot_tile<E, 1>(router + row * s.in_width, &x, s.in_width, &logits[level]);
    logits[level] -= E::widen(threshold[row]);
    if (level + 1 < s.depth) node = 2 * node + (logits[level] > 0.0f);
  }
  return read_route(logits, s.depth, node);
}

// routes (N, P)
template <class E>
static Status find_routes(const LeafShape& s, const LeafForwardTensors& tensors, Route* routes) {
  typedef typename E::type T;
  const T *x = (const T*)tensors.x, *router = (const T*)tensors.router, *threshold = (const T*)tensors.threshold;
  if (s.depth == 0 || s.num_rows <= 2) {
    for (int64_t i = 0; i < s.num_rows; ++i)
      for (int64_t tree = 0; tree < s.trees; ++tree)
        routes[i * s.trees + tree] = route_row<E>(s, x + i * s.in_width, router + tree * s.routers() * s.in_width,
                                                  threshold + tree * s.routers());
    return kDone;
  }
  const Shape walk_shape = s.router_shape();
  Scratch<float> logits(s.num_rows * walk_shape.visits());
  Scratch<uint32_t> reached(s.num_rows * s.trees);
  Scratch<T> bias(s.trees * s.routers());
  if (logits.missing() || reached.missing() || bias.missing()) return kNoMemory;
  negate<E>(threshold, s.trees * s.routers(), bias.data);
  const Walk<E> w = {&walk_shape, x, router, bias.data, logits.data, reached.data};
  const Status status = walk(w);
  if (status != kDone) return status;
  for (int64_t i = 0; i < s.num_rows * s.trees; ++i)
    routes[i] = read_route(logits.data + i * s.depth, s.depth, reached.data[i]);
  return kDone;
}

// ---- rows by leaf ----

struct LeafTask {  // rows of one leaf: positions [begin, end) of the sorted rows; the leaf's rows begin at `first`
  int64_t leaf;
  int32_t begin, end, first, all;  // `all` rows chose the leaf
};

// Rows of one tree sorted by a key below 2^key_bits (leaf, or router), and cut into tasks of at most `block` rows.
struct RowsByLeaf {
  Scratch<int32_t> rows, spare;
  Scratch<uint32_t> keys;  // to be filled in before `group`
  Scratch<LeafTask> tasks;
  int64_t num_rows, block, num_tasks;

  RowsByLeaf(int64_t num_rows, int64_t num_keys, int64_t block)
      : rows(num_rows),
        spare(num_rows),
        keys(num_rows),
        tasks(min64(num_keys, num_rows) + num_rows / block),
        num_rows(num_rows),
        block(block),
        num_tasks(0) {}
  bool missing() const { return rows.missing() || spare.missing() || keys.missing() || tasks.missing(); }

  void group(int key_bits) {
    for (int64_t i = 0; i < num_rows; ++i) rows.data[i] = (int32_t)i;
    sort_by_key(rows.data, spare.data, num_rows, keys.data, 1, key_bits);
    num_tasks = 0;
    for (int64_t first = 0, last; first < num_rows; first = last) {
      const uint32_t key = keys.data[rows.data[first]];
      last = first + 1;
      while (last < num_rows && keys.data[rows.data[last]] == key) ++last;
      for (int64_t begin = first; begin < last; begin += block)
        tasks.data[num_tasks++] = {(int64_t)key, (int32_t)begin, (int32_t)min64(last, begin + block), (int32_t)first,
                                   (int32_t)(last - first)};
    }
  }
};

}  // namespace FFF_ISA
}  // namespace fff

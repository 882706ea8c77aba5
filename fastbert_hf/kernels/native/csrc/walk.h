// The walk: which nodes each row visits, and their logits.
//
// A block of rows goes down the tree level by level. Rows at the same node form a group, so that a weight row is
// loaded once for several rows of x, which stay in the second-level cache; a group is then split by its decisions.
// Many rows go in two stages: the top levels block by block, then, sorted by the node they reached, the subtrees
// one after the other, so that a subtree's weights stay in cache too.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int kBlock = 256;  // rows that walk together: 768 kB of x at 768 float32 columns

struct Group {
  uint32_t node;  // position inside its level, from the left
  int32_t begin, end;
};

// Where a walk reads and writes: row i's logit of (tree, level) is logits[i * visits + tree * levels + level].
template <class E>
struct Walk {
  const Shape* shape;
  const typename E::type *x, *weight_in, *bias_in;
  float* logits;
  uint32_t* reached;  // (N, P) position of the node that a row is at, inside its level
};

// Slots hold the block's rows in the order in which they came; `order` groups the slots by node.
struct BlockScratch {
  int32_t row[kBlock];  // of each slot
  int32_t order[kBlock];
  int32_t right[kBlock];
  float logit[kBlock];
  Group groups[2][kBlock + 1];  // one more than there are: children are written before they are counted
};

// Rows per weight row in registers: as many as the register file holds.
#if defined(FFF_ISA_AVX512)
constexpr int kRowsPerDot = 6;
#else
constexpr int kRowsPerDot = 2;
#endif

template <class E, int T>
static __attribute__((noinline)) void group_dots(const Walk<E>& w, const typename E::type* weights,
                                                 const int32_t* rows, const int32_t* slots, float* out) {
  const int64_t width = w.shape->in_width;
  const typename E::type* x[T];
  for (int t = 0; t < T; ++t) x[t] = w.x + rows[slots[t]] * width;
  dot_tile<E, T>(weights, x, width, out);
}

// Logits of the slots of one group. `is_first` says that nobody has touched these rows of x before.
template <class E>
static void group_logits(const Walk<E>& w, const typename E::type* weights, const int32_t* rows, const int32_t* slots,
                         int count, bool is_first, float* out) {
  const int64_t width = w.shape->in_width;
  int i = 0;
  for (; i + kRowsPerDot <= count; i += kRowsPerDot) {
    if (is_first)
      for (int t = i + kAhead * kRowsPerDot; t < i + (kAhead + 1) * kRowsPerDot && t < count; ++t)
        prefetch_row(w.x + rows[slots[t]] * width, width * (int64_t)sizeof(typename E::type));
    group_dots<E, kRowsPerDot>(w, weights, rows, slots + i, out + i);
  }
  if (kRowsPerDot > 4 && i + 4 <= count) {
    group_dots<E, 4>(w, weights, rows, slots + i, out + i);
    i += 4;
  }
  for (; i + 2 <= count; i += 2) group_dots<E, 2>(w, weights, rows, slots + i, out + i);
  if (i < count) group_dots<E, 1>(w, weights, rows, slots + i, out + i);
}

// Computes a group's logits and splits it: its rows that go left come first. Appends the children that have rows to
// `next` and returns how many those are.
template <class E>
static int split_group(const Walk<E>& w, BlockScratch& block, const Group& group, int64_t tree, int level,
                       bool is_first, Group* next) {
  const Shape& s = *w.shape;
  const int64_t weight_row = tree * s.nodes() + ((int64_t)1 << level) - 1 + group.node;
  const bool decides = level < s.depth;
  int32_t* slots = block.order + group.begin;
  const int size = group.end - group.begin;
  group_logits<E>(w, w.weight_in + weight_row * s.in_width, block.row, slots, size, is_first, block.logit);
  const float bias = w.bias_in ? E::widen(w.bias_in[weight_row]) : 0.0f;
  int lefts = 0, rights = 0;
  for (int i = 0; i < size; ++i) {
    const int32_t slot = slots[i];
    const float logit = w.bias_in ? block.logit[i] + bias : block.logit[i];
    w.logits[(block.row[slot] * s.trees + tree) * s.levels() + level] = logit;
    const bool goes_right = decides && logit > 0.0f;
    block.right[rights] = slot;
    slots[lefts] = slot;
    rights += goes_right;
    lefts += !goes_right;
  }
  for (int i = 0; i < rights; ++i) slots[lefts + i] = block.right[i];
  const uint32_t child = decides ? 2 * group.node : group.node;
  int children = 0;
  next[children] = {child, group.begin, group.begin + lefts};
  children += lefts > 0;  // branchless: this branch would be unpredictable
  next[children] = {child + 1, group.begin + lefts, group.end};
  children += rights > 0;
  return children;
}

// Walks levels [first_level, end_level) of one tree for the first `count` rows of the block, all at node `start`;
// leaves the node that each reached, a leaf if end_level is past the last level.
template <class E>
static void walk_block(const Walk<E>& w, BlockScratch& block, int count, int64_t tree, uint32_t start,
                       int first_level, int end_level) {
  const Shape& s = *w.shape;
  const int64_t row_bytes = s.in_width * (int64_t)sizeof(typename E::type);
  for (int i = 0; i < count; ++i) block.order[i] = i;
  Group *groups = block.groups[0], *next = block.groups[1];
  int num_groups = 1;
  groups[0] = {start, 0, count};
  for (int level = first_level; level < end_level; ++level) {
    const int64_t level_row = tree * s.nodes() + ((int64_t)1 << level) - 1;
    const char* weights = (const char*)(w.weight_in + level_row * s.in_width);
    for (int g = 0; g < num_groups && g < kAhead; ++g) prefetch_row(weights + groups[g].node * row_bytes, row_bytes);
    int num_next = 0;
    for (int g = 0; g < num_groups; ++g) {
      if (g + kAhead < num_groups) prefetch_row(weights + groups[g + kAhead].node * row_bytes, row_bytes);
      num_next += split_group(w, block, groups[g], tree, level, level == first_level, next + num_next);
    }
    Group* done = groups;
    groups = next;
    next = done;
    num_groups = num_next;
  }
  for (int g = 0; g < num_groups; ++g)
    for (int i = groups[g].begin; i < groups[g].end; ++i)
      w.reached[block.row[block.order[i]] * s.trees + tree] = groups[g].node;
}

// Levels of the first stage: as many as leave about one block of rows to a subtree.
static int top_levels(const Shape& s) {
  int levels = 0;
  while (levels < s.depth && (s.num_rows >> levels) > kBlock + kBlock / 2) ++levels;
  return levels == 0 ? s.depth + 1 : levels;
}

// Second stage: rows sorted by the node they reached, in blocks that share that node.
template <class E>
static Status walk_subtrees(const Walk<E>& w, BlockScratch* blocks, int level) {
  const Shape& s = *w.shape;
  struct Task {
    int64_t tree;
    const int32_t* rows;
    int32_t count;
    uint32_t node;
  };
  Scratch<int32_t> rows(s.trees * s.num_rows), spare(s.trees * s.num_rows);
  Scratch<Task> tasks(s.trees * (((int64_t)1 << level) + ceil_div(s.num_rows, kBlock)));
  if (rows.missing() || spare.missing() || tasks.missing()) return kNoMemory;
  auto sort_tree = [&](int64_t tree, int) {
    int32_t *sorted = rows.data + tree * s.num_rows, *other = spare.data + tree * s.num_rows;
    for (int64_t i = 0; i < s.num_rows; ++i) sorted[i] = (int32_t)i;
    sort_by_key(sorted, other, s.num_rows, w.reached + tree, s.trees, level);
  };
  parallel(s.threads, s.trees, sort_tree);
  int64_t num_tasks = 0;
  for (int64_t tree = 0; tree < s.trees; ++tree) {
    const int32_t* sorted = rows.data + tree * s.num_rows;
    for (int64_t begin = 0, end; begin < s.num_rows; begin = end) {
      const uint32_t node = w.reached[sorted[begin] * s.trees + tree];
      end = begin + 1;
      while (end < s.num_rows && end - begin < kBlock && w.reached[sorted[end] * s.trees + tree] == node) ++end;
      tasks.data[num_tasks++] = {tree, sorted + begin, (int32_t)(end - begin), node};
    }
  }
  auto walk_task = [&](int64_t i, int worker) {
    const Task& task = tasks.data[i];
    BlockScratch& block = blocks[worker];
    for (int32_t j = 0; j < task.count; ++j) block.row[j] = task.rows[j];
    walk_block(w, block, task.count, task.tree, task.node, level, s.depth + 1);
  };
  parallel(s.threads, num_tasks, walk_task);
  return kDone;
}

// Every row through every tree.
template <class E>
static Status walk(const Walk<E>& w) {
  const Shape& s = *w.shape;
  Scratch<BlockScratch> blocks(s.threads);
  if (blocks.missing()) return kNoMemory;
  const int end_level = top_levels(s);
  const int64_t block_rows = min64(kBlock, max64(8, ceil_div(s.num_rows, s.threads)));
  auto walk_task = [&](int64_t i, int worker) {
    BlockScratch& block = blocks.data[worker];
    const int count = (int)min64(block_rows, s.num_rows - i * block_rows);
    for (int j = 0; j < count; ++j) block.row[j] = (int32_t)(i * block_rows + j);
    for (int64_t tree = 0; tree < s.trees; ++tree) walk_block(w, block, count, tree, 0, 0, end_level);
  };
  parallel(s.threads, ceil_div(s.num_rows, block_rows), walk_task);
  return end_level > s.depth ? kDone : walk_subtrees(w, blocks.data, end_level);
}

}  // namespace FFF_ISA
}  // namespace fff

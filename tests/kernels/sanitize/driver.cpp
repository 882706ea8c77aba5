// Runs the native kernels over awkward shapes, in buffers of exactly the right size, for the sanitizers to watch.
// Also compares with a plain double-precision walk, and one thread with several. Exit code 0: all is well.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

extern "C" {
void fff_set_parallel_region(void* gomp_parallel);
int fff_select_instruction_set(const char* name);
int fff_forward(const void* x, const void* weight_in, const void* bias_in, const void* weight_out, void* y,
                int32_t* visited, float* logits, int64_t num_rows, int64_t in_width, int64_t out_width, int64_t trees,
                int depth, int activation, int dtype, int threads);
int fff_backward(const void* grad_y, const void* x, const void* weight_in, const void* weight_out,
                 const int32_t* visited, const float* logits, void* grad_x, void* grad_weight_in, void* grad_bias_in,
                 void* grad_weight_out, int64_t num_rows, int64_t in_width, int64_t out_width, int64_t trees,
                 int depth, int activation, int dtype, int threads);
int fff_leaf_forward(const void* x, const void* router, const void* threshold, const void* weight_in,
                     const void* bias_in, const void* weight_out, const void* bias_out, void* y, int32_t* leaves,
                     int32_t* deciders, float* margins, float* logits, int64_t num_rows, int64_t in_width,
                     int64_t out_width, int64_t trees, int64_t leaf_width, int depth, int activation, int dtype,
                     int threads);
int fff_leaf_backward(const void* grad_y, const void* x, const void* router, const void* weight_in,
                      const void* weight_out, const void* bias_out, const int32_t* leaves, const int32_t* deciders,
                      const float* margins, const float* logits, void* grad_x, void* grad_router,
                      void* grad_threshold, void* grad_weight_in, void* grad_bias_in, void* grad_weight_out,
                      void* grad_bias_out, int64_t num_rows, int64_t in_width, int64_t out_width, int64_t trees,
                      int64_t leaf_width, int depth, int activation, int dtype, int threads);
}

namespace {

// What GOMP_parallel does, with threads that the sanitizers know.
void parallel_region(void (*work)(void*), void* argument, unsigned num_threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned i = 1; i < num_threads; ++i) team.emplace_back(work, argument);
  work(argument);
  for (std::thread& member : team) member.join();
}

std::mt19937 generator(0);

// A tensor of float32 or bfloat16 that ends where its memory ends.
struct Tensor {
  int64_t count;
  int dtype;
  char* data;
  Tensor(int64_t n, int type, bool random) : count(n), dtype(type), data((char*)malloc(bytes())) {
    memset(data, 0xff, bytes());  // NaN: what is not written shows
    std::normal_distribution<float> normal;
    if (random)
      for (int64_t i = 0; i < n; ++i) set(i, normal(generator));
  }
  ~Tensor() { free(data); }
  Tensor(const Tensor&) = delete;
  size_t bytes() const { return (size_t)count * (dtype == 0 ? 4 : 2); }
  void set(int64_t i, float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if (dtype == 0)
      memcpy(data + 4 * i, &word, 4);
    else
      memcpy(data + 2 * i, (char*)&word + 2, 2);
  }
  double get(int64_t i) const {
    uint32_t word = 0;
    memcpy(dtype == 0 ? (char*)&word : (char*)&word + 2, data + (dtype == 0 ? 4 : 2) * i, dtype == 0 ? 4 : 2);
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};

struct Case {
  int64_t num_rows, in_width, out_width, trees;
  int depth;
  int64_t leaf_width;  // 0: trees of single neurons
};

int failures = 0;

void expect(bool holds, const char* what, const Case& c, const char* set, int dtype) {
  if (holds) return;
  ++failures;
  printf("%s fails: %s, dtype %d, N %ld, H %ld, H_out %ld, trees %ld, depth %d, leaf width %ld\n", what, set, dtype,
         (long)c.num_rows, (long)c.in_width, (long)c.out_width, (long)c.trees, c.depth, (long)c.leaf_width);
}

// y of relu trees along the given paths, in double precision
bool matches_plain_sums(const Case& c, const Tensor& x, const Tensor& weight_in, const Tensor& bias,
                        const Tensor& weight_out, const Tensor& y, const std::vector<int32_t>& visited) {
  const int64_t levels = c.depth + 1, nodes = ((int64_t)2 << c.depth) - 1;
  bool matches = true;
  for (int64_t row = 0; row < c.num_rows; row += 1 + c.num_rows / 7) {
    std::vector<double> sum(c.out_width, 0.0), scale(c.out_width, 1e-3);
    for (int64_t visit = 0; visit < c.trees * levels; ++visit) {
      const int64_t node = visit / levels * nodes + visited[row * c.trees * levels + visit];
      double logit = bias.get(node);
      for (int64_t i = 0; i < c.in_width; ++i)
        logit += x.get(row * c.in_width + i) * weight_in.get(node * c.in_width + i);
      for (int64_t i = 0; i < c.out_width; ++i) {
        const double term = (logit > 0 ? logit : 0) * weight_out.get(node * c.out_width + i);
        sum[i] += term;
        scale[i] += std::fabs(term) + 1e-2;
      }
    }
    for (int64_t i = 0; i < c.out_width; ++i) {
      const double value = y.get(row * c.out_width + i);
      matches &= std::fabs(value - sum[i]) <= (y.dtype == 0 ? 1e-4 : 1e-2) * (scale[i] + std::fabs(sum[i]));
    }
  }
  return matches;
}

void run(const Case& c, const char* set, int dtype, int activation) {
  const int64_t nodes = c.trees * (((int64_t)2 << c.depth) - 1), visits = c.num_rows * c.trees * (c.depth + 1);
  Tensor x(c.num_rows * c.in_width, dtype, true), weight_in(nodes * c.in_width, dtype, true),
      bias(nodes, dtype, true);
  Tensor weight_out(nodes * c.out_width, dtype, true), grad_y(c.num_rows * c.out_width, dtype, true);
  std::vector<std::vector<char>> first;
  for (int threads : {1, 3}) {
    Tensor y(c.num_rows * c.out_width, dtype, false), other_y(c.num_rows * c.out_width, dtype, false);
    std::vector<int32_t> visited(visits);
    std::vector<float> logits(visits);
    int status =
        fff_forward(x.data, weight_in.data, bias.data, weight_out.data, y.data, visited.data(), logits.data(),
                    c.num_rows, c.in_width, c.out_width, c.trees, c.depth, activation, dtype, threads);
    status |= fff_forward(x.data, weight_in.data, bias.data, weight_out.data, other_y.data, nullptr, nullptr,
                          c.num_rows, c.in_width, c.out_width, c.trees, c.depth, activation, dtype, threads);
    expect(status == 0, "forward", c, set, dtype);
    expect(memcmp(y.data, other_y.data, y.bytes()) == 0, "y without paths", c, set, dtype);
    if (activation == 2)
      expect(matches_plain_sums(c, x, weight_in, bias, weight_out, y, visited), "plain sums", c, set, dtype);
    Tensor grad_x(x.count, dtype, false), grad_in(weight_in.count, dtype, false), grad_bias(nodes, dtype, false);
    Tensor grad_out(weight_out.count, dtype, false);
    status = fff_backward(grad_y.data, x.data, weight_in.data, weight_out.data, visited.data(), logits.data(),
                          grad_x.data, grad_in.data, grad_bias.data, grad_out.data, c.num_rows, c.in_width,
                          c.out_width, c.trees, c.depth, activation, dtype, threads);
    expect(status == 0, "backward", c, set, dtype);
    std::vector<std::vector<char>> results;
    for (const Tensor* t : {&y, &grad_x, &grad_in, &grad_bias, &grad_out}) {
      results.emplace_back(t->data, t->data + t->bytes());
      bool finite = true;
      for (int64_t i = 0; i < t->count; ++i) finite &= std::isfinite(t->get(i));
      expect(finite, "finite results", c, set, dtype);
    }
    if (threads == 1)
      first = results;
    else
      expect(first == results, "equal bits on several threads", c, set, dtype);
    visited[visits / 2] += 1;
    expect(c.num_rows == 0 || fff_backward(grad_y.data, x.data, weight_in.data, weight_out.data, visited.data(),
                                           logits.data(), grad_x.data, nullptr, nullptr, nullptr, c.num_rows,
                                           c.in_width, c.out_width, c.trees, c.depth, activation, dtype, 1) != 0,
           "refusal of a path that is none", c, set, dtype);
  }
}

// The leaf that a row takes in one tree, how certain its least certain decision is, and y of relu leaves, in double
// precision. Rows that rounding may send another way are left out.
bool matches_plain_leaves(const Case& c, const Tensor& x, const Tensor& router, const Tensor& threshold,
                          const Tensor& weight_in, const Tensor& bias_in, const Tensor& weight_out,
                          const Tensor& bias_out, const Tensor& y, const std::vector<int32_t>& leaves) {
  const int64_t all = (int64_t)1 << c.depth, w = c.leaf_width;
  bool matches = true;
  for (int64_t row = 0; row < c.num_rows; row += 1 + c.num_rows / 7) {
    std::vector<double> sum(c.out_width, 0.0), scale(c.out_width, 1e-3);
    bool clear = true;
    for (int64_t tree = 0; tree < c.trees; ++tree) {
      int64_t leaf = 0;
      double least = INFINITY;
      for (int level = 0; level < c.depth; ++level) {
        const int64_t node = tree * (all - 1) + ((int64_t)1 << level) - 1 + leaf;
        double logit = -threshold.get(node);
        for (int64_t i = 0; i < c.in_width; ++i)
          logit += x.get(row * c.in_width + i) * router.get(node * c.in_width + i);
        least = std::fmin(least, std::fabs(logit));
        leaf = 2 * leaf + (logit > 0);
      }
      clear &= least > 1e-3;
      matches &= !clear || leaf == leaves[row * c.trees + tree];
      const double confidence = 1 / (1 + std::exp(-least));
      const int64_t first = tree * all + leaf;
      for (int64_t i = 0; i < c.out_width; ++i) sum[i] += confidence * bias_out.get(first * c.out_width + i);
      for (int64_t k = first * w; k < (first + 1) * w; ++k) {
        double logit = bias_in.get(k);
        for (int64_t i = 0; i < c.in_width; ++i)
          logit += x.get(row * c.in_width + i) * weight_in.get(k * c.in_width + i);
        for (int64_t i = 0; i < c.out_width; ++i) {
          const double term = confidence * (logit > 0 ? logit : 0) * weight_out.get(k * c.out_width + i);
          sum[i] += term;
          scale[i] += std::fabs(term) + 1e-2;
        }
      }
    }
    for (int64_t i = 0; clear && i < c.out_width; ++i) {
      const double value = y.get(row * c.out_width + i);
      matches &= std::fabs(value - sum[i]) <= (y.dtype == 0 ? 1e-4 : 1e-2) * (scale[i] + std::fabs(sum[i]));
    }
  }
  return matches;
}

void run_leaves(const Case& c, const char* set, int dtype, int activation) {
  const int64_t leaves_held = c.trees << c.depth, routers = leaves_held - c.trees, w = c.leaf_width;
  const int64_t neurons = leaves_held * w, paths = c.num_rows * c.trees;
  Tensor x(c.num_rows * c.in_width, dtype, true), router(routers * c.in_width, dtype, true);
  Tensor threshold(routers, dtype, true), weight_in(neurons * c.in_width, dtype, true), bias_in(neurons, dtype, true);
  Tensor weight_out(neurons * c.out_width, dtype, true), bias_out(leaves_held * c.out_width, dtype, true);
  Tensor grad_y(c.num_rows * c.out_width, dtype, true);
  std::vector<std::vector<char>> first;
  for (int threads : {1, 3}) {
    Tensor y(c.num_rows * c.out_width, dtype, false), other_y(c.num_rows * c.out_width, dtype, false);
    std::vector<int32_t> leaves(paths), deciders(paths);
    std::vector<float> margins(paths), logits(paths * w);
    int status =
        fff_leaf_forward(x.data, router.data, threshold.data, weight_in.data, bias_in.data, weight_out.data,
                         bias_out.data, y.data, leaves.data(), deciders.data(), margins.data(), logits.data(),
                         c.num_rows, c.in_width, c.out_width, c.trees, w, c.depth, activation, dtype, threads);
    status |= fff_leaf_forward(x.data, router.data, threshold.data, weight_in.data, bias_in.data, weight_out.data,
                               bias_out.data, other_y.data, nullptr, nullptr, nullptr, nullptr, c.num_rows,
                               c.in_width, c.out_width, c.trees, w, c.depth, activation, dtype, threads);
    expect(status == 0, "forward", c, set, dtype);
    expect(memcmp(y.data, other_y.data, y.bytes()) == 0, "y without routes", c, set, dtype);
    if (activation == 2)
      expect(matches_plain_leaves(c, x, router, threshold, weight_in, bias_in, weight_out, bias_out, y, leaves),
             "plain sums", c, set, dtype);
    Tensor grad_x(x.count, dtype, false), grad_router(router.count, dtype, false),
        grad_threshold(routers, dtype, false);
    Tensor grad_in(weight_in.count, dtype, false), grad_bias_in(neurons, dtype, false);
    Tensor grad_out(weight_out.count, dtype, false), grad_bias_out(bias_out.count, dtype, false);
    auto backward = [&](void* of_router) {
      return fff_leaf_backward(grad_y.data, x.data, router.data, weight_in.data, weight_out.data, bias_out.data,
                               leaves.data(), deciders.data(), margins.data(), logits.data(), grad_x.data, of_router,
                               grad_threshold.data, grad_in.data, grad_bias_in.data, grad_out.data,
                               grad_bias_out.data, c.num_rows, c.in_width, c.out_width, c.trees, w, c.depth,
                               activation, dtype, threads);
    };
    expect(backward(grad_router.data) == 0, "backward", c, set, dtype);
    std::vector<std::vector<char>> results;
    for (const Tensor* t :
         {&y, &grad_x, &grad_router, &grad_threshold, &grad_in, &grad_bias_in, &grad_out, &grad_bias_out}) {
      results.emplace_back(t->data, t->data + t->bytes());
      bool finite = true;
      for (int64_t i = 0; i < t->count; ++i) finite &= std::isfinite(t->get(i));
      expect(finite, "finite results", c, set, dtype);
    }
    if (threads == 1)
      first = results;
    else
      expect(first == results, "equal bits on several threads", c, set, dtype);
    const int32_t leaf = leaves[paths / 2], decider = deciders[paths / 2];
    for (int32_t wrong : {-1, 1 << c.depth, INT32_MAX, INT32_MIN}) {
      leaves[paths / 2] = wrong;
      expect(backward(nullptr) != 0, "refusal of a leaf that is none", c, set, dtype);
      leaves[paths / 2] = leaf;
      deciders[paths / 2] = wrong;
      expect((c.depth == 0 && wrong >= 0) || backward(nullptr) != 0, "refusal of a decider off the path", c, set,
             dtype);
      deciders[paths / 2] = decider;
    }
  }
}

}  // namespace

int run_int8(const char* set);     // int8.cpp
int run_encoder(const char* set);  // encoder.cpp

int main() {
  fff_set_parallel_region((void*)parallel_region);
  const Case cases[] = {
      {1, 1, 1, 1, 0, 0},    {1, 37, 41, 2, 3, 0},    {2, 16, 33, 1, 5, 0},    {3, 31, 7, 3, 0, 0},
      {5, 64, 15, 40, 1, 0}, {17, 65, 129, 1, 4, 0},  {70, 5, 300, 2, 2, 0},   {300, 19, 18, 1, 8, 0},
      {700, 9, 35, 3, 3, 0}, {1300, 7, 10, 1, 6, 0},  {40, 130, 97, 1, 12, 0}, {600, 3, 2, 70, 0, 0},
      {1, 1, 1, 1, 0, 1},    {1, 37, 41, 2, 3, 7},    {2, 16, 33, 1, 5, 192},  {3, 31, 7, 3, 0, 13},
      {5, 64, 15, 40, 1, 2}, {17, 465, 129, 1, 4, 5}, {70, 5, 300, 2, 2, 96},  {300, 19, 18, 1, 8, 1},
      {700, 9, 35, 3, 3, 7}, {9, 30, 17, 1, 12, 1},   {600, 3, 2, 70, 0, 1},   {300, 3, 8192, 2, 1, 1}};
  int sets = 0;
  for (const char* set : {"generic", "avx2", "avx512", "avx512_bf16"}) {
    if (!fff_select_instruction_set(set)) continue;
    ++sets;
    int activation = 0;
    for (const Case& c : cases)
      for (int dtype : {0, 1})
        (c.leaf_width ? run_leaves : run)(c, set, dtype, activation++ % 3 == 0 ? 2 : activation % 4);
    failures += run_int8(set);
    failures += run_encoder(set);
  }
  printf("%d instruction sets, %d failures\n", sets, failures);
  return failures != 0;
}

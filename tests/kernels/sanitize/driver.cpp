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
};

int failures = 0;

void expect(bool holds, const char* what, const Case& c, const char* set, int dtype) {
  if (holds) return;
  ++failures;
  printf("%s fails: %s, dtype %d, N %ld, H %ld, H_out %ld, trees %ld, depth %d\n", what, set, dtype, (long)c.num_rows,
         (long)c.in_width, (long)c.out_width, (long)c.trees, c.depth);
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

}  // namespace

int main() {
  fff_set_parallel_region((void*)parallel_region);
  const Case cases[] = {{1, 1, 1, 1, 0},    {1, 37, 41, 2, 3},   {2, 16, 33, 1, 5},    {3, 31, 7, 3, 0},
                        {5, 64, 15, 40, 1}, {17, 65, 129, 1, 4}, {70, 5, 300, 2, 2},   {300, 19, 18, 1, 8},
                        {700, 9, 35, 3, 3}, {1300, 7, 10, 1, 6}, {40, 130, 97, 1, 12}, {600, 3, 2, 70, 0}};
  int sets = 0;
  for (const char* set : {"generic", "avx2", "avx512"}) {
    if (!fff_select_instruction_set(set)) continue;
    ++sets;
    int activation = 0;
    for (const Case& c : cases)
      for (int dtype : {0, 1}) run(c, set, dtype, activation++ % 3 == 0 ? 2 : activation % 4);
  }
  printf("%d instruction sets, %d failures\n", sets, failures);
  return failures != 0;
}

// The same for the kernels of int8 weights: awkward shapes, buffers of exactly the right size, several threads.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "values.h"

extern "C" {
int fff_int8_forward(const void* x, const float* weight_in, const float* bias_in, const int8_t* weight_out,
                     const float* scale_out, const float* output_scale, void* y, int32_t* visited, int64_t num_rows,
                     int64_t in_width, int64_t out_width, int64_t trees, int depth, int activation, int dtype,
                     int threads);
int fff_int8_leaf_forward(const void* x, const float* router, const float* threshold, const float* input_scale,
                          const int8_t* weight_in, const float* scale_in, const int32_t* sum_in, const float* bias_in,
                          const int8_t* weight_out, const float* scale_out, const int32_t* sum_out,
                          const float* bias_out, void* y, int32_t* leaves, float* margins, int64_t num_rows,
                          int64_t in_width, int64_t out_width, int64_t trees, int64_t leaf_width, int depth,
                          int activation, int dtype, int threads);
}

namespace {

struct Case {
  int64_t num_rows, in_width, out_width, trees;
  int depth;
  int64_t leaf_width;  // 0: trees of single neurons
};

// 1 if something fails
int run(const Case& c, const char* set, int dtype, int activation) {
  const int64_t leaves = c.trees << c.depth, w = c.leaf_width;
  const int64_t nodes = c.trees * (((int64_t)2 << c.depth) - 1), neurons = w ? leaves * w : nodes;
  const Floats values(c.num_rows * c.in_width), router((leaves - c.trees) * c.in_width), threshold(leaves - c.trees);
  const Floats input_scale(c.in_width), float_in(w ? 0 : nodes * c.in_width), scale_in(neurons), bias_in(neurons);
  const Floats scale_out(w ? leaves * c.out_width : nodes), bias_out(leaves * c.out_width), output_scale(c.out_width);
  const Bytes weight_in(w ? leaves * w * padded(c.in_width) : 0);
  const Bytes weight_out(w ? leaves * c.out_width * padded(w) : nodes * c.out_width);
  Values<int32_t> sum_in(neurons), sum_out(leaves * c.out_width);
  memset(sum_in.data, 0, sum_in.bytes());
  memset(sum_out.data, 0, sum_out.bytes());
  const Rows x(values, dtype);
  std::vector<char> first;
  bool fine = true;
  for (int threads : {1, 3}) {
    Rows y(c.num_rows * c.out_width, dtype), other(c.num_rows * c.out_width, dtype);
    Values<int32_t> paths(w ? c.num_rows * c.trees : c.num_rows * c.trees * (c.depth + 1));
    Values<float> margins(c.num_rows * c.trees);
    auto forward = [&](void* out, int32_t* path, float* margin) {
      if (!w)
        return fff_int8_forward(x.data, float_in.data, bias_in.data, weight_out.data, scale_out.data,
                                output_scale.data, out, path, c.num_rows, c.in_width, c.out_width, c.trees, c.depth,
                                activation, dtype, threads);
      return fff_int8_leaf_forward(x.data, router.data, threshold.data, input_scale.data, weight_in.data,
                                   scale_in.data, sum_in.data, bias_in.data, weight_out.data, scale_out.data,
                                   sum_out.data, bias_out.data, out, path, margin, c.num_rows, c.in_width,
                                   c.out_width, c.trees, w, c.depth, activation, dtype, threads);
    };
    fine &= forward(y.data, paths.data, margins.data) == 0 && forward(other.data, nullptr, nullptr) == 0;
    fine &= y.finite() && memcmp(y.data, other.data, y.bytes()) == 0;
    if (threads == 1)
      first.assign(y.data, y.data + y.bytes());
    else
      fine &= memcmp(first.data(), y.data, y.bytes()) == 0;
  }
  if (!fine)
    printf("int8 fails: %s, dtype %d, N %ld, H %ld, H_out %ld, trees %ld, depth %d, leaf width %ld\n", set, dtype,
           (long)c.num_rows, (long)c.in_width, (long)c.out_width, (long)c.trees, c.depth, (long)w);
  return !fine;
}

}  // namespace

// Failures of the instruction set that is chosen.
int run_int8(const char* set) {
  const Case cases[] = {{1, 1, 1, 1, 0, 0},     {1, 37, 41, 2, 3, 0},     {5, 64, 15, 40, 1, 0},
                        {70, 5, 300, 2, 2, 0},  {700, 9, 35, 1, 4, 0},    {40, 30, 97, 1, 9, 0},
                        {1, 1, 1, 1, 0, 1},     {1, 37, 41, 2, 3, 7},     {2, 16, 33, 1, 5, 192},
                        {3, 31, 7, 3, 0, 13},   {5, 64, 15, 40, 1, 2},    {17, 65, 129, 1, 4, 5},
                        {70, 5, 300, 2, 2, 96}, {300, 19, 18, 1, 8, 1},   {700, 9, 35, 3, 3, 7},
                        {9, 30, 17, 1, 10, 1},  {2, 700, 300, 2, 1, 900}, {300, 3, 4096, 2, 1, 1}};
  int failures = 0, activation = 0;
  for (const Case& c : cases)
    for (int dtype : {0, 1}) failures += run(c, set, dtype, activation++ % 4);
  return failures;
}

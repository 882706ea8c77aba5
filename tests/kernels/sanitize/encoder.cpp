// The same for the kernels around an encoder's feed-forward blocks: int8 linear layers, attention, both together, and
// norms. Also compares with plain sums in double precision.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "values.h"

extern "C" {
int fff_int8_linear(const void* x, const int8_t* weight, const float* scale, const int32_t* sum, const float* bias,
                    void* y, int64_t num_rows, int64_t in_width, int64_t out_width, int dtype, int threads);
int fff_attention(const void* query_key_value, const uint8_t* visible, void* y, int64_t texts, int64_t tokens,
                  int64_t heads, int64_t head_dim, double scale, int dtype, int threads);
int fff_int8_attention(const void* x, const uint8_t* visible, const int8_t* weight_in, const float* scale_in,
                       const int32_t* sum_in, const float* bias_in, const int8_t* weight_out, const float* scale_out,
                       const int32_t* sum_out, const float* bias_out, void* y, int64_t texts, int64_t tokens,
                       int64_t heads, int64_t head_dim, double scale, int dtype, int threads);
int fff_add_norm(const float* x, const void* y, const float* weight, const float* bias, float* out, int64_t num_rows,
                 int64_t width, double epsilon, int dtype, int threads);
}

namespace {

// A function of the library, all its arguments but these given; its status.
typedef std::function<int(const void* x, void* y, int threads)> Call;

bool close(double value, double expected, double tolerance, int dtype) {
  return std::fabs(value - expected) <= tolerance + (dtype == 0 ? 1e-5 : 1.0 / 128) * std::fabs(expected);
}

// Whether y, to be filled in, has the same bits on several threads, and NaN or Inf in one of `units` rows or texts
// reaches no other.
bool holds_for(const Call& call, Rows* x, int64_t units, Rows* y) {
  bool holds = call(x->data, y->data, 1) == 0 && y->finite();
  Rows other(y->count / y->size(), y->dtype);
  holds &= call(x->data, other.data, 3) == 0 && memcmp(y->data, other.data, y->bytes()) == 0;
  const int64_t bad = units / 2, width = x->count / x->size() / units, out_width = y->count / y->size() / units;
  const std::vector<char> clean(x->data, x->data + x->bytes());
  for (float value : {NAN, INFINITY, -INFINITY}) {
    for (int64_t i = bad * width; i < (bad + 1) * width; ++i) x->set(i, value);
    memset(other.data, 0, other.bytes());
    holds &= call(x->data, other.data, 3) == 0 && !other.finite(bad * out_width, (bad + 1) * out_width);
    const int64_t before = bad * out_width * y->size(), after = before + out_width * y->size();
    holds &= memcmp(y->data, other.data, before) == 0;
    holds &= memcmp(y->data + after, other.data + after, y->bytes() - after) == 0;
  }
  memcpy(x->data, clean.data(), clean.size());
  return holds;
}

struct Linear {
  int64_t inputs, outputs;
  Bytes weight;
  Floats scale, bias;
  Values<int32_t> sum;

  Linear(int64_t in, int64_t out)
      : inputs(in), outputs(out), weight(out * padded(in)), scale(out), bias(out), sum(out) {
    for (int64_t r = 0; r < out; ++r) {
      scale.data[r] = (1.5f + std::tanh(scale.data[r])) / (127 * std::sqrt((float)in));
      sum.data[r] = 0;
      for (int64_t k = 0; k < padded(in); ++k) {
        if (k >= in) weight.data[place(r, k)] = 0;
        sum.data[r] += weight.data[place(r, k)];
      }
    }
  }
  // Where the weight of an output and an input lies.
  int64_t place(int64_t output, int64_t input) const {
    const int64_t block = output / 16 * 16, rows = std::min<int64_t>(16, outputs - block);
    return block * padded(inputs) + input / 4 * 4 * rows + (output - block) * 4 + input % 4;
  }
  int run(const void* x, void* y, bool with_bias, int64_t rows, int dtype, int threads) const {
    return fff_int8_linear(x, weight.data, scale.data, sum.data, with_bias ? bias.data : nullptr, y, rows, inputs,
                           outputs, dtype, threads);
  }
};

struct LinearCase {
  int64_t rows, in_width, out_width;
};

// Every x may be off by a step of its row's quantisation.
bool matches_plain_sums(const LinearCase& c, const Linear& layer, bool with_bias, const Rows& x, const Rows& y) {
  for (int64_t row = 0; row < c.rows; row += 1 + c.rows / 7) {
    double low = 0, high = 0;
    for (int64_t k = 0; k < c.in_width; ++k) {
      low = std::fmin(low, x.get(row * c.in_width + k));
      high = std::fmax(high, x.get(row * c.in_width + k));
    }
    for (int64_t i = 0; i < c.out_width; ++i) {
      double sum = with_bias ? layer.bias.data[i] : 0, weights = 0;
      for (int64_t k = 0; k < c.in_width; ++k) {
        const double weight = layer.weight.data[layer.place(i, k)] * (double)layer.scale.data[i];
        sum += weight * x.get(row * c.in_width + k);
        weights += std::fabs(weight);
      }
      const double tolerance = 1e-5 + 1.01 * weights * (high - low) / 255;
      if (!close(y.get(row * c.out_width + i), sum, tolerance, y.dtype)) return false;
    }
  }
  return true;
}

bool run_linear(const LinearCase& c, int dtype, bool with_bias) {
  const Linear layer(c.in_width, c.out_width);
  Rows x(Floats(c.rows * c.in_width), dtype), y(c.rows * c.out_width, dtype);
  const Call call = [&](const void* in, void* out, int threads) {
    return layer.run(in, out, with_bias, c.rows, dtype, threads);
  };
  return holds_for(call, &x, c.rows, &y) && matches_plain_sums(c, layer, with_bias, x, y);
}

struct AttentionCase {
  int64_t texts, tokens, heads, head_dim;
  int64_t width() const { return heads * head_dim; }
  int64_t rows() const { return texts * tokens; }
  double scale() const { return 1 / std::sqrt((double)head_dim); }
};

// The keys that a text sees: about half of them, one, or none.
struct Visible : Values<uint8_t> {
  explicit Visible(const AttentionCase& c) : Values(c.rows()) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t text = i / c.tokens, key = i % c.tokens;
      data[i] = text % 3 == 0 ? generator() % 2 : text % 3 == 1 && key == c.tokens - 1;
    }
  }
};

bool matches_plain_attention(const AttentionCase& c, const uint8_t* visible, const Rows& x, const Rows& y) {
  const int64_t width = c.width();
  std::vector<double> weights(c.tokens);
  for (int64_t text = 0; text < c.texts; ++text) {
    const uint8_t* sees = visible ? visible + text * c.tokens : nullptr;
    if (sees && !memchr(sees, 1, c.tokens)) sees = nullptr;
    for (int64_t query = 0; query < c.tokens; query += 1 + c.tokens / 7)
      for (int64_t head = 0; head < c.heads; ++head) {
        const auto at = [&](int64_t token, int64_t part, int64_t k) -> double {
          return x.get(((text * c.tokens + token) * 3 + part) * width + head * c.head_dim + k);
        };
        double total = 0;
        for (int64_t key = 0; key < c.tokens; ++key) {
          double score = 0;
          for (int64_t k = 0; k < c.head_dim; ++k) score += at(query, 0, k) * at(key, 1, k);
          weights[key] = sees && !sees[key] ? 0 : std::exp(score * c.scale());
          total += weights[key];
        }
        for (int64_t k = 0; k < c.head_dim; ++k) {
          double sum = 0;
          for (int64_t key = 0; key < c.tokens; ++key) sum += weights[key] / total * at(key, 2, k);
          const double value = y.get((text * c.tokens + query) * width + head * c.head_dim + k);
          if (!close(value, sum, 1e-5, y.dtype)) return false;
        }
      }
  }
  return true;
}

bool run_attention(const AttentionCase& c, int dtype, const uint8_t* visible) {
  Rows x(Floats(c.rows() * 3 * c.width()), dtype), y(c.rows() * c.width(), dtype);
  const Call call = [&](const void* in, void* out, int threads) {
    return fff_attention(in, visible, out, c.texts, c.tokens, c.heads, c.head_dim, c.scale(), dtype, threads);
  };
  return holds_for(call, &x, c.texts, &y) && matches_plain_attention(c, visible, x, y);
}

// Equal to the three functions that it consists of.
bool run_int8_attention(const AttentionCase& c, int dtype, const uint8_t* visible, bool with_bias) {
  const int64_t width = c.width(), rows = c.rows();
  const Linear in(width, 3 * width), out(width, width);
  Rows x(Floats(rows * width), dtype), y(rows * width, dtype);
  const Call call = [&](const void* from, void* to, int threads) {
    return fff_int8_attention(from, visible, in.weight.data, in.scale.data, in.sum.data,
                              with_bias ? in.bias.data : nullptr, out.weight.data, out.scale.data, out.sum.data,
                              with_bias ? out.bias.data : nullptr, to, c.texts, c.tokens, c.heads, c.head_dim,
                              c.scale(), dtype, threads);
  };
  bool holds = holds_for(call, &x, c.texts, &y);
  Rows joined(rows * 3 * width, dtype), mixed(rows * width, dtype), expected(rows * width, dtype);
  holds &= in.run(x.data, joined.data, with_bias, rows, dtype, 1) == 0;
  holds &= fff_attention(joined.data, visible, mixed.data, c.texts, c.tokens, c.heads, c.head_dim, c.scale(), dtype,
                         1) == 0;
  holds &= out.run(mixed.data, expected.data, with_bias, rows, dtype, 1) == 0;
  return holds && memcmp(y.data, expected.data, y.bytes()) == 0;
}

bool run_norm(int64_t rows, int64_t width, int dtype) {
  const Floats x(rows * width), weight(width), bias(width);
  Rows y(Floats(rows * width), dtype), out(rows * width, 0);
  const Call call = [&](const void* from, void* to, int threads) {
    return fff_add_norm(x.data, from, weight.data, bias.data, (float*)to, rows, width, 1e-5, dtype, threads);
  };
  bool holds = holds_for(call, &y, rows, &out);
  for (int64_t row = 0; row < rows; row += 1 + rows / 7) {
    const auto total = [&](int64_t i) { return (double)x.data[row * width + i] + y.get(row * width + i); };
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < width; ++i) mean += total(i) / width;
    for (int64_t i = 0; i < width; ++i) variance += (total(i) - mean) * (total(i) - mean) / width;
    for (int64_t i = 0; i < width; ++i) {
      const double expected = (total(i) - mean) / std::sqrt(variance + 1e-5) * weight.data[i] + bias.data[i];
      holds &= close(out.get(row * width + i), expected, 2e-5, 0);
    }
  }
  if (dtype == 0) {  // in place
    holds &= call(y.data, y.data, 3) == 0 && memcmp(y.data, out.data, out.bytes()) == 0;
  }
  return holds;
}

// 1 if something fails
int report(bool holds, const char* function, const char* set, int dtype, const std::vector<int64_t>& sizes) {
  if (holds) return 0;
  printf("%s fails: %s, dtype %d, sizes", function, set, dtype);
  for (int64_t size : sizes) printf(" %ld", (long)size);
  printf("\n");
  return 1;
}

int run_attentions(const AttentionCase& c, const char* set, int dtype, bool with_linear) {
  int failures = 0;
  const Visible some(c);
  const std::vector<int64_t> sizes = {c.texts, c.tokens, c.heads, c.head_dim};
  for (const uint8_t* visible : {(const uint8_t*)nullptr, (const uint8_t*)some.data}) {
    failures +=
        report(run_attention(c, dtype, visible), visible ? "attention to some" : "attention", set, dtype, sizes);
    if (with_linear)
      failures += report(run_int8_attention(c, dtype, visible, visible != nullptr),
                         visible ? "int8 attention to some" : "int8 attention", set, dtype, sizes);
  }
  return failures;
}

}  // namespace

// Failures of the instruction set that is chosen.
int run_encoder(const char* set) {
  int failures = 0;
  for (int dtype : {0, 1}) {
    for (int64_t tokens : {1, 5, 6, 7, 16, 17, 33})
      for (int64_t head_dim : {1, 4, 20, 32, 65}) {
        const bool with_linear = head_dim % 4 != 0 || tokens % 16 == 1;
        failures += run_attentions({3, tokens, 2, head_dim}, set, dtype, with_linear);
      }
    failures += run_attentions({16, 33, 2, 65}, set, dtype, true);  // more texts than a core takes at once
    bool with_bias = false;
    for (int64_t rows : {1, 5, 64, 67})
      for (int64_t in_width : {1, 3, 33, 64})
        for (int64_t out_width : {1, 15, 50, 97})
          failures += report(run_linear({rows, in_width, out_width}, dtype, with_bias = !with_bias), "int8 linear",
                             set, dtype, {rows, in_width, out_width});
    // rows shared by threads, then columns
    for (const LinearCase& c : {LinearCase{300, 64, 97}, {40, 33, 1000}, {1, 64, 20000}})
      failures += report(run_linear(c, dtype, true), "int8 linear", set, dtype, {c.rows, c.in_width, c.out_width});
    for (int64_t rows : {1, 3, 70})
      for (int64_t width : {1, 3, 16, 33, 64, 97})
        failures += report(run_norm(rows, width, dtype), "add_norm", set, dtype, {rows, width});
    failures += report(run_norm(1300, 384, dtype), "add_norm", set, dtype, {1300, 384});
  }
  return failures;
}

// The library's C functions for trees with int8 weights; part of library.cpp.
#pragma once

namespace fff {

#if defined(FFF_HAS_AVX512_VNNI)
namespace avx512_vnni {
extern const Int8Products products;
}
#endif

namespace {

// Products are several times as quick as those of floats.
constexpr int kInt8Speed = 4;

bool has_vnni() {
#if defined(FFF_HAS_AVX512_VNNI)
  return strncmp(chosen->name, "avx512", 6) == 0 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

Int8Products int8_products() {
#if defined(FFF_HAS_AVX512_VNNI)
  if (has_vnni()) return avx512_vnni::products;
#endif
  return chosen->int8.products;
}

}  // namespace
}  // namespace fff

// Which instruction set multiplies int8 weights where the chosen one does the rest.
FFF_API const char* fff_int8_products() { return fff::has_vnni() ? "avx512_vnni" : fff::chosen->int8.products_name; }

FFF_API int fff_int8_forward(const void* x, const float* weight_in, const float* bias_in, const int8_t* weight_out,
                             const float* scale_out, const float* output_scale, void* y, int32_t* visited,
                             int64_t num_rows, int64_t in_width, int64_t out_width, int64_t trees, int depth,
                             int activation, int dtype, int threads) {
  fff::Shape shape = {num_rows, in_width, out_width, trees, depth, activation, threads};
  if (!fff::in_range(shape, dtype)) return fff::kBadArgument;
  if (fff::missing(x, in_width) || fff::missing(weight_in, in_width) || fff::missing(weight_out, out_width) ||
      !scale_out || fff::missing(output_scale, out_width) || fff::missing(y, out_width))
    return fff::kNoData;
  shape.threads = fff::useful_threads(shape, shape.visits() * (in_width + out_width));
  fff::expect_writes(y, num_rows * out_width * (dtype == 0 ? 4 : 2));
  return fff::chosen->int8.forward[dtype](shape,
                                          {x, weight_in, bias_in, weight_out, scale_out, output_scale, y, visited});
}

FFF_API int fff_int8_leaf_forward(const void* x, const float* router, const float* threshold,
                                  const float* input_scale, const int8_t* weight_in, const float* scale_in,
                                  const int32_t* sum_in, const float* bias_in, const int8_t* weight_out,
                                  const float* scale_out, const int32_t* sum_out, const float* bias_out, void* y,
                                  int32_t* leaves, float* margins, int64_t num_rows, int64_t in_width,
                                  int64_t out_width, int64_t trees, int64_t leaf_width, int depth, int activation,
                                  int dtype, int threads) {
  fff::LeafShape shape = {num_rows, in_width, out_width, trees, leaf_width, depth, activation, threads};
  if (!fff::in_range(shape, dtype) || in_width > fff::kMaxInt8Width || leaf_width > fff::kMaxInt8Width)
    return fff::kBadArgument;
  const int64_t routers = trees * shape.routers();
  if (fff::missing(x, in_width) || fff::missing(router, routers * in_width) || fff::missing(threshold, routers) ||
      fff::missing(input_scale, in_width) || fff::missing(weight_in, in_width) || !scale_in || !sum_in ||
      fff::missing(weight_out, out_width) || fff::missing(scale_out, out_width) || fff::missing(sum_out, out_width) ||
      fff::missing(y, out_width))
    return fff::kNoData;
  const int64_t products = depth * in_width + leaf_width * (in_width + out_width) / fff::kInt8Speed;
  shape.threads = fff::useful_threads(shape, trees * products);
  fff::expect_writes(y, num_rows * out_width * (dtype == 0 ? 4 : 2));
  return fff::chosen->int8.leaf_forward[dtype](
      shape,
      {x, router, threshold, input_scale, weight_in, scale_in, sum_in, bias_in, weight_out, scale_out, sum_out,
       bias_out, y, leaves, margins},
      fff::int8_products());
}

FFF_API int fff_int8_linear(const void* x, const int8_t* weight, const float* scale, const int32_t* sum,
                            const float* bias, void* y, int64_t num_rows, int64_t in_width, int64_t out_width,
                            int dtype, int threads) {
  fff::LinearShape shape = {num_rows, in_width, out_width, threads};
  if (num_rows < 1 || in_width < 1 || in_width > fff::kMaxInt8Width || out_width < 1 || threads < 1 ||
      (dtype != 0 && dtype != 1))
    return fff::kBadArgument;
  const fff::Int8Linear layer = {weight, scale, sum, bias};
  if (!x || layer.missing() || !y) return fff::kNoData;
  shape.threads = fff::useful_threads(threads, num_rows * in_width * out_width / fff::kInt8Speed);
  fff::expect_writes(y, num_rows * out_width * (dtype == 0 ? 4 : 2));
  return fff::chosen->int8.linear[dtype](shape, {x, layer, y}, fff::int8_products());
}

FFF_API int fff_int8_attention(const void* x, const uint8_t* visible, const int8_t* weight_in, const float* scale_in,
                               const int32_t* sum_in, const float* bias_in, const int8_t* weight_out,
                               const float* scale_out, const int32_t* sum_out, const float* bias_out, void* y,
                               int64_t texts, int64_t tokens, int64_t heads, int64_t head_dim, double scale,
                               int dtype, int threads) {
  fff::AttentionShape shape = {texts, tokens, heads, head_dim, (float)scale, threads};
  const int64_t width = heads * head_dim;
  if (!fff::in_range(shape, dtype) || width > fff::kMaxInt8Width) return fff::kBadArgument;
  const fff::Int8Linear in = {weight_in, scale_in, sum_in, bias_in}, out = {weight_out, scale_out, sum_out, bias_out};
  if (!x || in.missing() || out.missing() || !y) return fff::kNoData;
  const int64_t linear = texts * tokens * 4 * width * width / fff::kInt8Speed;
  shape.threads = fff::useful_threads(threads, shape.products() + linear);
  fff::expect_writes(y, texts * tokens * width * (dtype == 0 ? 4 : 2));
  return fff::chosen->int8.attention[dtype](shape, {x, visible, in, out, y}, fff::int8_products());
}

// All with their arguments as one block of words, as fff_forward_packed.
FFF_API int fff_int8_forward_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_int8_forward(at(0), (float*)at(1), (float*)at(2), (int8_t*)at(3), (float*)at(4), (float*)at(5), at(6),
                          (int32_t*)at(7), a[8], a[9], a[10], a[11], (int)a[12], (int)a[13], (int)a[14], (int)a[15]);
}

FFF_API int fff_int8_leaf_forward_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_int8_leaf_forward(at(0), (float*)at(1), (float*)at(2), (float*)at(3), (int8_t*)at(4), (float*)at(5),
                               (int32_t*)at(6), (float*)at(7), (int8_t*)at(8), (float*)at(9), (int32_t*)at(10),
                               (float*)at(11), at(12), (int32_t*)at(13), (float*)at(14), a[15], a[16], a[17], a[18],
                               a[19], (int)a[20], (int)a[21], (int)a[22], (int)a[23]);
}

FFF_API int fff_int8_linear_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_int8_linear(at(0), (int8_t*)at(1), (float*)at(2), (int32_t*)at(3), (float*)at(4), at(5), a[6], a[7],
                         a[8], (int)a[9], (int)a[10]);
}

FFF_API int fff_int8_attention_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_int8_attention(at(0), (uint8_t*)at(1), (int8_t*)at(2), (float*)at(3), (int32_t*)at(4), (float*)at(5),
                            (int8_t*)at(6), (float*)at(7), (int32_t*)at(8), (float*)at(9), at(10), a[11], a[12],
                            a[13], a[14], fff::double_of(a[15]), (int)a[16], (int)a[17]);
}

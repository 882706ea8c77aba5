// A linear layer with int8 weights: y = Q(x) W^T + b, with Q for quantised rows, as one half of a leaf computes it.
//
// Sums of products are integers, and what follows them is float32, element by element. So no result depends on how
// rows, blocks or threads divide the work.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int64_t kLinearBlock = 64;  // rows that pass a panel of weights together, while it stays in the first cache

// Columns [begin, end) of y for rows [row, row + count), begin a multiple of 16.
template <class E>
static void int8_linear_tile(const LinearShape& s, const Int8LinearTensors& t, Int8Products products,
                             const uint8_t* q, const RowScale* scales, int64_t row, int64_t count, int64_t begin,
                             int64_t end, int32_t* dots) {
  const int64_t padded = padded_columns(s.in_width), bytes = s.out_width * padded;
  const uint8_t* rows[kLinearBlock];
  for (int64_t i = 0; i < count; ++i) rows[i] = q + i * padded;
  typename E::type* y = (typename E::type*)t.y + row * s.out_width;
  for (int64_t panel = begin; panel < end; panel += kInt8Panel) {
    const int64_t width = min64(kInt8Panel, end - panel);
    const int8_t* next = ahead(t.layer.weight, bytes, panel * padded, nullptr);
    products({rows, count, padded / 4, t.layer.weight + panel * padded, width, dots, kInt8Panel, next});
    for (int64_t column = panel; column < panel + width; column += kInt8Block) {
      const int64_t columns = panel + width - column;
      const Int8Linear& p = t.layer;
      const BlockScales block(p.sum + column, p.scale + column, p.bias ? p.bias + column : nullptr, columns);
      for (int64_t i = 0; i < count; ++i) {
        Floats values;
        block_values(block, dots + i * kInt8Panel + column - panel, scales[i], &values);
        store_block(y + i * s.out_width + column, values, columns);
      }
    }
  }
}

template <class E>
static Status int8_linear(const LinearShape& s, const Int8LinearTensors& t, Int8Products products) {
  const int64_t padded = padded_columns(s.in_width), blocks = ceil_div(s.num_rows, kLinearBlock);
  // where there are fewer blocks of rows than threads, threads share the columns: each piece quantises its rows anew
  const int64_t panels = ceil_div(s.out_width, kInt8Panel);
  const int64_t wanted = min64(panels, blocks >= s.threads ? 1 : ceil_div(s.threads, blocks));
  const int64_t columns = ceil_div(panels, wanted) * kInt8Panel, pieces = ceil_div(s.out_width, columns);
  Scratch<uint8_t> q(s.threads * kLinearBlock * padded);
  Scratch<int32_t> dots(s.threads * kLinearBlock * kInt8Panel);
  Scratch<float> wide(s.threads * padded);
  if (q.missing() || dots.missing() || wide.missing()) return kNoMemory;
  auto task = [&](int64_t i, int worker) {
    const int64_t row = i / pieces * kLinearBlock, count = min64(kLinearBlock, s.num_rows - row);
    const int64_t begin = i % pieces * columns;
    uint8_t* rows = q.data + worker * kLinearBlock * padded;
    RowScale scales[kLinearBlock];
    for (int64_t r = 0; r < count; ++r) {
      const typename E::type* x = (const typename E::type*)t.x + (row + r) * s.in_width;
      if (E::kIsFloat) {
        scales[r] = quantize_row((const float*)x, s.in_width, rows + r * padded);
      } else {
        widen_plain<E>(x, s.in_width, wide.data + worker * padded);
        scales[r] = quantize_row(wide.data + worker * padded, s.in_width, rows + r * padded);
      }
    }
    int8_linear_tile<E>(s, t, products, rows, scales, row, count, begin, min64(s.out_width, begin + columns),
                        dots.data + worker * kLinearBlock * kInt8Panel);
  };
  parallel(s.threads, blocks * pieces, task);
  return kDone;
}

}  // namespace FFF_ISA
}  // namespace fff

// A call in parts of so many rows that scratch memory stays bounded.
#pragma once

namespace fff {
namespace FFF_ISA {

constexpr int64_t kChunkBytes = 8 << 20;  // scratch memory that grows with the number of rows is kept below this

// Runs `run(part, slice)` for parts of the rows, at least 4 * block of them at a time. `advance(&slice, begin)` moves
// what a form of tree has beside x and y to row `begin`.
template <class E, class S, class Tensors, class Advance, class Run>
static Status by_chunks(const S& s, const Tensors& tensors, int64_t bytes_per_row, int64_t block, Advance advance,
                        Run run) {
  typedef typename E::type T;
  const int64_t chunk = max64(4 * block, kChunkBytes / bytes_per_row);
  for (int64_t begin = 0; begin < s.num_rows; begin += chunk) {
    S part = s;
    part.num_rows = min64(chunk, s.num_rows - begin);
    Tensors slice = tensors;
    slice.x = (const T*)tensors.x + begin * s.in_width;
    slice.y = (T*)tensors.y + begin * s.out_width;
    advance(&slice, begin);
    const Status status = run(part, slice);
    if (status != kDone) return status;
  }
  return kDone;
}

}  // namespace FFF_ISA
}  // namespace fff

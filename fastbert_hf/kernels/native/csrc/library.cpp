// The library's C functions, the choice of an instruction set, and the parallel loop.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common.h"

namespace fff {

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif
#if defined(FFF_HAS_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

const Kernels* chosen = nullptr;

// GOMP_parallel of the OpenMP runtime that torch has loaded: this library links none of its own, so both share one
// pool of threads. Null: everything runs on the calling thread; `forked` says why.
typedef void (*ParallelRegion)(void (*)(void*), void*, unsigned, unsigned);
ParallelRegion parallel_region = nullptr;
bool forked = false;

// OpenMP's threads do not exist in a forked child, and a region there would wait for them for ever.
void forget_threads() {
  parallel_region = nullptr;
  forked = true;
}

struct Region {
  void (*task)(void*, int64_t, int);
  void* context;
  int64_t count, next;
  int workers;
};

void work(void* argument) {
  Region* region = (Region*)argument;
  const int worker = __atomic_fetch_add(&region->workers, 1, __ATOMIC_RELAXED);
  for (;;) {
    const int64_t i = __atomic_fetch_add(&region->next, 1, __ATOMIC_RELAXED);
    if (i >= region->count) return;
    region->task(region->context, i, worker);
  }
}

bool runs_here(const Kernels* kernels) {
#if defined(FFF_HAS_AVX512_BF16)
  if (kernels == &avx512_bf16::kernels) return __builtin_cpu_supports("avx512bf16") && runs_here(&avx512::kernels);
#endif
#if defined(__x86_64__)
  if (kernels == &avx2::kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (kernels == &avx512::kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return kernels == &generic::kernels;
}

const Kernels* const known[] = {
#if defined(FFF_HAS_AVX512_BF16)
    &avx512_bf16::kernels,
#endif
#if defined(__x86_64__)
    &avx512::kernels, &avx2::kernels,
#endif
    &generic::kernels};

__attribute__((constructor)) void initialise() {
  for (const Kernels* kernels : known)
    if (!chosen && runs_here(kernels)) chosen = kernels;
  pthread_atfork(nullptr, nullptr, forget_threads);
}

// Asks for huge pages where the kernels are about to write a large buffer. Allocators hand such buffers out fresh
// from the system, and taking 50 MB in pages of 4 kB costs several times what the kernels do.
void expect_writes(void* buffer, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 2 << 20, first = ((uintptr_t)buffer + page - 1) / page * page;
  const uintptr_t last = ((uintptr_t)buffer + bytes) / page * page;
  if (buffer && bytes >= 4 << 20 && first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes;
#endif
}

// A thread is worth waking for about ten microseconds of products.
constexpr int64_t kProductsPerThread = 150000, kProductsPerWrite = 6;

int useful_threads(const Shape& s, int64_t products_per_row, int64_t other_products = 0) {
  const int64_t rows_per_thread = max64(1, kProductsPerThread / max64(1, products_per_row));
  const int64_t useful = max64(s.num_rows / rows_per_thread, other_products / kProductsPerThread);
  return (int)max64(1, min64(s.threads, useful));
}

// A leaf is wide enough to share even one row's work among threads.
int useful_threads(const LeafShape& s, int64_t products_per_row, int64_t other_products = 0) {
  const int64_t products = max64(s.num_rows * products_per_row, other_products);
  return (int)max64(1, min64(s.threads, products / kProductsPerThread));
}

bool in_range(const Shape& s, int dtype) {
  return s.num_rows > 0 && s.in_width >= 0 && s.out_width >= 0 && s.trees >= 1 && s.depth >= 0 && s.depth <= 30 &&
         s.activation >= 0 && s.activation <= 3 && s.threads >= 1 && (dtype == 0 || dtype == 1);
}

bool in_range(const LeafShape& s, int dtype) {
  return s.num_rows > 0 && s.in_width >= 0 && s.out_width >= 0 && s.trees >= 1 && s.leaf_width >= 1 && s.depth >= 0 &&
         s.depth <= 24 && s.activation >= 0 && s.activation <= 3 && s.threads >= 1 && (dtype == 0 || dtype == 1);
}

bool in_range(const AttentionShape& s, int dtype) {
  return s.texts >= 1 && s.tokens >= 1 && s.heads >= 1 && s.head_dim >= 1 && s.threads >= 1 &&
         (dtype == 0 || dtype == 1);
}

int useful_threads(int threads, int64_t products) {
  return (int)max64(1, min64(threads, products / kProductsPerThread));
}

// A double from its bits, as blocks of words hold it.
double double_of(int64_t bits) {
  double number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

// Tensors without memory of their own (zeros that torch has not written yet) have null pointers.
bool missing(const void* tensor, int64_t count) { return count > 0 && !tensor; }

// Forward walks a large call in chunks. Backward sorts all rows at once, by numbers of type int32_t.
bool rows_in_range(int64_t num_rows) { return num_rows <= INT32_MAX; }

}  // namespace

void run_tasks(int threads, int64_t count, void (*task)(void*, int64_t, int), void* context) {
  if (threads <= 1 || count <= 1 || !parallel_region) {
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
    return;
  }
  Region region = {task, context, count, 0, 0};
  parallel_region(work, &region, (unsigned)min64(threads, count), 0);
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  if (bytes <= 0 || posix_memalign(&memory, 64, (size_t)bytes) != 0) return nullptr;
  return memory;
}

void sort_by_key(int32_t* rows, int32_t* spare, int64_t count, const uint32_t* keys, int64_t stride, int key_bits) {
  const int digit_bits = count >= 1024 ? 11 : 8;
  int64_t starts[1 << 11];
  int32_t *from = rows, *to = spare;
  for (int shift = 0; shift < key_bits; shift += digit_bits) {
    const int bits = key_bits - shift < digit_bits ? key_bits - shift : digit_bits;
    const uint32_t mask = (1u << bits) - 1;
    memset(starts, 0, sizeof(int64_t) << bits);
    for (int64_t i = 0; i < count; ++i) ++starts[keys[from[i] * stride] >> shift & mask];
    int64_t sum = 0;
    for (uint32_t digit = 0; digit <= mask; ++digit) {
      const int64_t size = starts[digit];
      starts[digit] = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) to[starts[keys[from[i] * stride] >> shift & mask]++] = from[i];
    int32_t* swap = from;
    from = to;
    to = swap;
  }
  if (from != rows) memcpy(rows, from, count * sizeof(int32_t));
}

}  // namespace fff

#define FFF_API extern "C" __attribute__((visibility("default")))

// Raised with every change of a function's arguments: the loader refuses a library built from other sources.
FFF_API int fff_abi_version() { return 5; }

FFF_API void fff_set_parallel_region(void* gomp_parallel) {
  memcpy(&fff::parallel_region, &gomp_parallel, sizeof gomp_parallel);
}

// 0: a parallel region was set and is used; 1: none was set; 2: this process was forked, its parent has the threads.
FFF_API int fff_threads_state() { return fff::forked ? 2 : (fff::parallel_region ? 0 : 1); }

FFF_API const char* fff_instruction_set() { return fff::chosen->name; }

// Returns 0 if this machine or this build does not have the named set.
FFF_API int fff_select_instruction_set(const char* name) {
  for (const fff::Kernels* kernels : fff::known)
    if (strcmp(kernels->name, name) == 0 && fff::runs_here(kernels)) {
      fff::chosen = kernels;
      return 1;
    }
  return 0;
}

FFF_API int fff_forward(const void* x, const void* weight_in, const void* bias_in, const void* weight_out, void* y,
                        int32_t* visited, float* logits, int64_t num_rows, int64_t in_width, int64_t out_width,
                        int64_t trees, int depth, int activation, int dtype, int threads) {
  fff::Shape shape = {num_rows, in_width, out_width, trees, depth, activation, threads};
  if (!fff::in_range(shape, dtype)) return fff::kBadArgument;
  if (fff::missing(x, in_width) || fff::missing(weight_in, in_width) || fff::missing(weight_out, out_width) ||
      fff::missing(y, out_width))
    return fff::kNoData;
  shape.threads = fff::useful_threads(shape, shape.visits() * (in_width + out_width));
  const int64_t size = dtype == 0 ? 4 : 2;
  fff::expect_writes(y, num_rows * out_width * size);
  return fff::chosen->forward[dtype](shape, {x, weight_in, bias_in, weight_out, y, visited, logits});
}

FFF_API int fff_backward(const void* grad_y, const void* x, const void* weight_in, const void* weight_out,
                         const int32_t* visited, const float* logits, void* grad_x, void* grad_weight_in,
                         void* grad_bias_in, void* grad_weight_out, int64_t num_rows, int64_t in_width,
                         int64_t out_width, int64_t trees, int depth, int activation, int dtype, int threads) {
  fff::Shape shape = {num_rows, in_width, out_width, trees, depth, activation, threads};
  if (!fff::in_range(shape, dtype) || !fff::rows_in_range(num_rows)) return fff::kBadArgument;
  const int64_t size = dtype == 0 ? 4 : 2, nodes = shape.trees * shape.nodes();
  if (fff::missing(grad_y, out_width) || fff::missing(x, in_width) || fff::missing(weight_in, in_width) ||
      fff::missing(weight_out, out_width) || !visited || !logits)
    return fff::kNoData;
  const bool through_logits = grad_x || grad_weight_in || grad_bias_in;
  const int64_t widths = (through_logits ? out_width : 0) + (grad_x ? in_width : 0) +
                         (grad_weight_in ? in_width : 0) + (grad_weight_out ? out_width : 0);
  const int64_t written = nodes * ((grad_weight_in ? in_width : 0) + (grad_weight_out ? out_width : 0));
  shape.threads = fff::useful_threads(shape, shape.visits() * widths, written * fff::kProductsPerWrite);
  fff::expect_writes(grad_x, num_rows * in_width * size);
  fff::expect_writes(grad_weight_in, nodes * in_width * size);
  fff::expect_writes(grad_weight_out, nodes * out_width * size);
  return fff::chosen->backward[dtype](shape, {grad_y, x, weight_in, weight_out, visited, logits, grad_x,
                                              grad_weight_in, grad_bias_in, grad_weight_out});
}

FFF_API int fff_leaf_forward(const void* x, const void* router, const void* threshold, const void* weight_in,
                             const void* bias_in, const void* weight_out, const void* bias_out, void* y,
                             int32_t* leaves, int32_t* deciders, float* margins, float* logits, int64_t num_rows,
                             int64_t in_width, int64_t out_width, int64_t trees, int64_t leaf_width, int depth,
                             int activation, int dtype, int threads) {
  fff::LeafShape shape = {num_rows, in_width, out_width, trees, leaf_width, depth, activation, threads};
  if (!fff::in_range(shape, dtype)) return fff::kBadArgument;
  const int64_t routers = trees * shape.routers();
  if (fff::missing(x, in_width) || fff::missing(router, routers * in_width) || fff::missing(threshold, routers) ||
      fff::missing(weight_in, in_width) || fff::missing(weight_out, out_width) || fff::missing(y, out_width))
    return fff::kNoData;
  shape.threads = fff::useful_threads(shape, trees * (depth * in_width + leaf_width * (in_width + out_width)));
  fff::expect_writes(y, num_rows * out_width * (dtype == 0 ? 4 : 2));
  return fff::chosen->leaf_forward[dtype](
      shape, {x, router, threshold, weight_in, bias_in, weight_out, bias_out, y, leaves, deciders, margins, logits});
}

FFF_API int fff_leaf_backward(const void* grad_y, const void* x, const void* router, const void* weight_in,
                              const void* weight_out, const void* bias_out, const int32_t* leaves,
                              const int32_t* deciders, const float* margins, const float* logits, void* grad_x,
                              void* grad_router, void* grad_threshold, void* grad_weight_in, void* grad_bias_in,
                              void* grad_weight_out, void* grad_bias_out, int64_t num_rows, int64_t in_width,
                              int64_t out_width, int64_t trees, int64_t leaf_width, int depth, int activation,
                              int dtype, int threads) {
  fff::LeafShape shape = {num_rows, in_width, out_width, trees, leaf_width, depth, activation, threads};
  if (!fff::in_range(shape, dtype) || !fff::rows_in_range(num_rows)) return fff::kBadArgument;
  if (fff::missing(grad_y, out_width) || fff::missing(x, in_width) || fff::missing(weight_in, in_width) ||
      fff::missing(router, trees * shape.routers() * in_width) || fff::missing(weight_out, out_width) || !leaves ||
      !deciders || !margins || !logits)
    return fff::kNoData;
  const int64_t size = dtype == 0 ? 4 : 2, neurons = shape.trees * shape.leaves() * leaf_width;
  const int64_t written = neurons * ((grad_weight_in ? in_width : 0) + (grad_weight_out ? out_width : 0));
  shape.threads =
      fff::useful_threads(shape, 2 * trees * leaf_width * (in_width + out_width), written * fff::kProductsPerWrite);
  fff::expect_writes(grad_x, num_rows * in_width * size);
  fff::expect_writes(grad_weight_in, neurons * in_width * size);
  fff::expect_writes(grad_weight_out, neurons * out_width * size);
  return fff::chosen->leaf_backward[dtype](
      shape, {grad_y, x, router, weight_in, weight_out, bias_out, leaves, deciders, margins, logits, grad_x,
              grad_router, grad_threshold, grad_weight_in, grad_bias_in, grad_weight_out, grad_bias_out});
}

// The two forward functions with their arguments, in order, as one block of 64-bit words: Python's ctypes takes
// longer over the single arguments than over the block, half as long as the kernels over one row.
FFF_API int fff_forward_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_forward(at(0), at(1), at(2), at(3), at(4), (int32_t*)at(5), (float*)at(6), a[7], a[8], a[9], a[10],
                     (int)a[11], (int)a[12], (int)a[13], (int)a[14]);
}

FFF_API int fff_leaf_forward_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_leaf_forward(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), (int32_t*)at(8), (int32_t*)at(9),
                          (float*)at(10), (float*)at(11), a[12], a[13], a[14], a[15], a[16], (int)a[17], (int)a[18],
                          (int)a[19], (int)a[20]);
}

FFF_API int fff_attention(const void* query_key_value, const uint8_t* visible, void* y, int64_t texts, int64_t tokens,
                          int64_t heads, int64_t head_dim, double scale, int dtype, int threads) {
  fff::AttentionShape shape = {texts, tokens, heads, head_dim, (float)scale, threads};
  if (!fff::in_range(shape, dtype)) return fff::kBadArgument;
  if (!query_key_value || !y) return fff::kNoData;
  shape.threads = fff::useful_threads(threads, shape.products());
  fff::expect_writes(y, texts * tokens * heads * head_dim * (dtype == 0 ? 4 : 2));
  return fff::chosen->attention[dtype](shape, {query_key_value, visible, y});
}

// As fff_forward_packed, the scale as the bits of a double.
FFF_API int fff_attention_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_attention(at(0), (uint8_t*)at(1), at(2), a[3], a[4], a[5], a[6], fff::double_of(a[7]), (int)a[8],
                       (int)a[9]);
}

FFF_API int fff_add_norm(const float* x, const void* y, const float* weight, const float* bias, float* out,
                         int64_t num_rows, int64_t width, double epsilon, int dtype, int threads) {
  fff::NormShape shape = {num_rows, width, (float)epsilon, threads};
  if (num_rows < 1 || width < 1 || threads < 1 || (dtype != 0 && dtype != 1)) return fff::kBadArgument;
  if (!x || !y || !weight || !bias || !out) return fff::kNoData;
  shape.threads = fff::useful_threads(threads, num_rows * width);
  return fff::chosen->add_norm[dtype](shape, {x, y, weight, bias, out});
}

// As fff_forward_packed, epsilon as the bits of a double.
FFF_API int fff_add_norm_packed(const int64_t* a) {
  auto at = [a](int i) { return (void*)(intptr_t)a[i]; };
  return fff_add_norm((float*)at(0), at(1), (float*)at(2), (float*)at(3), (float*)at(4), a[5], a[6],
                      fff::double_of(a[7]), (int)a[8], (int)a[9]);
}

#include "int8_api.h"

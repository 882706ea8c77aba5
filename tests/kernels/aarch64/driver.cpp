// One call of the native library: reads its arguments from a file, writes the status and all buffers to another.
//
//   driver FUNCTION COUNT_OF_POINTERS COUNT_OF_SIZES IN OUT
//
// IN holds, without padding: for each pointer its int64 count of bytes (-1: null) and the bytes, then the sizes
// (int64), then depth, activation, dtype and threads (int32). OUT: the int32 status, then the bytes of each buffer.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace {

void read_exactly(FILE* file, void* target, size_t bytes) {
  if (fread(target, 1, bytes, file) != bytes) {
    fprintf(stderr, "the file of arguments is too short\n");
    exit(2);
  }
}

template <size_t... P, size_t... S>
int call(void* function, void* const* pointers, const int64_t* sizes, const int32_t* codes, std::index_sequence<P...>,
         std::index_sequence<S...>) {
  typedef int (*Function)(decltype((void)P, (void*)nullptr)..., decltype((void)S, int64_t())..., int, int, int, int);
  return ((Function)function)(pointers[P]..., sizes[S]..., codes[0], codes[1], codes[2], codes[3]);
}

template <size_t P, size_t S>
int call(void* function, void* const* pointers, const int64_t* sizes, const int32_t* codes) {
  return call(function, pointers, sizes, codes, std::make_index_sequence<P>(), std::make_index_sequence<S>());
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) return 2;
  void* function = dlsym(RTLD_DEFAULT, arguments[1]);
  const int num_pointers = atoi(arguments[2]), num_sizes = atoi(arguments[3]);
  FILE* in = fopen(arguments[4], "rb");
  if (!function || !in) {
    fprintf(stderr, "no function %s, or no file %s\n", arguments[1], arguments[4]);
    return 2;
  }
  std::vector<int64_t> bytes(num_pointers), sizes(num_sizes);
  std::vector<void*> pointers(num_pointers, nullptr);
  for (int i = 0; i < num_pointers; ++i) {
    read_exactly(in, &bytes[i], sizeof(int64_t));
    if (bytes[i] < 0) continue;
    pointers[i] = malloc(bytes[i] + 1);
    read_exactly(in, pointers[i], bytes[i]);
  }
  int32_t codes[4], status = -1;
  read_exactly(in, sizes.data(), num_sizes * sizeof(int64_t));
  read_exactly(in, codes, sizeof codes);
  const int shape = 10 * num_pointers + num_sizes;
  if (shape == 74) status = call<7, 4>(function, pointers.data(), sizes.data(), codes);
  if (shape == 104) status = call<10, 4>(function, pointers.data(), sizes.data(), codes);
  if (shape == 125) status = call<12, 5>(function, pointers.data(), sizes.data(), codes);
  if (shape == 175) status = call<17, 5>(function, pointers.data(), sizes.data(), codes);
  FILE* out = fopen(arguments[5], "wb");
  if (!out) return 2;
  fwrite(&status, sizeof status, 1, out);
  for (int i = 0; i < num_pointers; ++i)
    if (pointers[i]) fwrite(pointers[i], 1, bytes[i], out);
  return fclose(out) == 0 ? 0 : 2;
}

// One call of the native library: reads its arguments from a file, writes the status and all buffers to another.
//
//   driver FUNCTION COUNT_OF_POINTERS COUNT_OF_NUMBERS IN OUT
//
// IN holds, without padding: for each pointer its int64 count of bytes (-1: null) and the bytes, then the other
// arguments as 64-bit words, a double by its bits. OUT: the int32 status, then the bytes of each buffer.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace {

void read_exactly(FILE* file, void* target, size_t bytes) {
  if (fread(target, 1, bytes, file) != bytes) {
    fprintf(stderr, "the file of arguments is too short\n");
    exit(2);
  }
}

// Of P pointers, S sizes, then depth, activation, dtype and threads.
template <size_t... P, size_t... S>
int call(void* function, const int64_t* words, std::index_sequence<P...>, std::index_sequence<S...>) {
  typedef int (*Function)(decltype((void)P, (void*)nullptr)..., decltype((void)S, int64_t())..., int, int, int, int);
  const int64_t *sizes = words + sizeof...(P), *codes = sizes + sizeof...(S);
  return ((Function)function)((void*)words[P]..., sizes[S]..., (int)codes[0], (int)codes[1], (int)codes[2],
                              (int)codes[3]);
}

template <size_t P, size_t S>
int call(void* function, const int64_t* words) {
  return call(function, words, std::make_index_sequence<P>(), std::make_index_sequence<S>());
}

// Through the form that takes all arguments as one block, where the function has it.
int call(const std::string& name, const std::vector<int64_t>& words) {
  if (void* function = dlsym(RTLD_DEFAULT, (name + "_packed").c_str()))
    return ((int (*)(const int64_t*))function)(words.data());
  void* function = dlsym(RTLD_DEFAULT, name.c_str());
  if (function && name == "fff_backward" && words.size() == 18) return call<10, 4>(function, words.data());
  if (function && name == "fff_leaf_backward" && words.size() == 26) return call<17, 5>(function, words.data());
  fprintf(stderr, "no function %s of %zu arguments\n", name.c_str(), words.size());
  exit(2);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) return 2;
  const int num_pointers = atoi(arguments[2]), num_numbers = atoi(arguments[3]);
  FILE* in = fopen(arguments[4], "rb");
  if (!in) return 2;
  std::vector<int64_t> bytes(num_pointers), words(num_pointers + num_numbers);
  for (int i = 0; i < num_pointers; ++i) {
    read_exactly(in, &bytes[i], sizeof(int64_t));
    if (bytes[i] < 0) continue;
    void* buffer = malloc(bytes[i] + 1);
    read_exactly(in, buffer, bytes[i]);
    words[i] = (int64_t)buffer;
  }
  read_exactly(in, words.data() + num_pointers, num_numbers * sizeof(int64_t));
  const int32_t status = call(arguments[1], words);
  FILE* out = fopen(arguments[5], "wb");
  if (!out) return 2;
  fwrite(&status, sizeof status, 1, out);
  for (int i = 0; i < num_pointers; ++i)
    if (words[i]) fwrite((void*)words[i], 1, bytes[i], out);
  return fclose(out) == 0 ? 0 : 2;
}

// Values in buffers of exactly the right size, for the programs of this folder.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>

inline std::mt19937 generator(0);

// Values in memory that ends where they end.
template <class T>
struct Values {
  T* data;
  int64_t count;
  explicit Values(int64_t n) : data((T*)malloc(n * sizeof(T))), count(n) { memset(data, 0xff, n * sizeof(T)); }
  ~Values() { free(data); }
  Values(const Values&) = delete;
  size_t bytes() const { return count * sizeof(T); }
};

struct Floats : Values<float> {
  explicit Floats(int64_t n) : Values(n) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) data[i] = normal(generator);
  }
};

struct Bytes : Values<int8_t> {
  explicit Bytes(int64_t n) : Values(n) {
    for (int64_t i = 0; i < n; ++i) data[i] = (int8_t)((int)(generator() % 255) - 127);
  }
};

// Rows of float32 or bfloat16 (the upper half of each float).
struct Rows : Values<char> {
  int dtype;
  Rows(int64_t n, int type) : Values(n * (type == 0 ? 4 : 2)), dtype(type) {}
  Rows(const Floats& from, int type) : Rows(from.count, type) {
    for (int64_t i = 0; i < from.count; ++i) set(i, from.data[i]);
  }
  int64_t size() const { return dtype == 0 ? 4 : 2; }  // of an element
  void set(int64_t i, float value) { memcpy(data + size() * i, (const char*)&value + 4 - size(), size()); }
  float get(int64_t i) const {
    float value = 0;
    memcpy((char*)&value + 4 - size(), data + size() * i, size());
    return value;
  }
  bool finite() const { return finite(0, count / size()); }
  bool finite(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i)
      if (!std::isfinite(get(i))) return false;
    return true;
  }
};

// Columns of packed int8 weights: whole groups of four.
inline int64_t padded(int64_t columns) { return (columns + 3) / 4 * 4; }

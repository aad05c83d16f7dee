// What a kernel's text needs from a GPU's compiler, for a C++ compiler.
//
// DIALECT_METAL or DIALECT_CUDA says which of the two the text is in. Address spaces mean
// nothing here: every pointer may be used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};

// The value of every lane of this simdgroup, once all of them are here.
void exchange(float value, float (&values)[32]);
extern thread_local unsigned lane_of_thread;

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

struct float16 {
  uint16_t bits;

  float16() = default;
  explicit float16(float value);
  operator float() const;
};

#ifdef DIALECT_METAL
#define device
#define constant
#define __METAL_VERSION__ 320
typedef unsigned uint;
typedef float16 float16_t;
typedef bfloat16 bfloat16_t;

namespace metal {
inline float simd_sum(float value) {
  float values[32];
  exchange(value, values);
  float sum = 0.0f;
  for (int lane = 0; lane < 32; ++lane) {
    sum += values[lane];
  }
  return sum;
}
}  // namespace metal
using namespace metal;
#endif

#ifdef DIALECT_CUDA
#define __CUDACC__ 12
#define __device__
#define __global__
#define __grid_constant__
typedef float16 __half;
typedef bfloat16 __nv_bfloat16;

struct Shape {
  int32_t sizes[8];
  int32_t operator[](int i) const {
    return sizes[i];
  }
};

extern thread_local uint3 blockIdx, blockDim, threadIdx;

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
  return {x, y, z};
}

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  float values[32];
  exchange(value, values);
  return mask == 0xffffffffu ? values[lane_of_thread ^ distance] : 0.0f;
}
#endif

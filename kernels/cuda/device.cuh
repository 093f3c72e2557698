// What the CUDA kernels share: code tables, elements as bits, 16-byte accesses. NVRTC compiles this without any header
// but the code tables. kernels/tests/cuda_shim.h defines QLF_ON_CPU and the CUDA names, so that the tests run the same
// kernels on the CPU.
//
// The results are specified bit by bit. Arithmetic is written with the _rn intrinsics, which the compiler never fuses
// into FMAs; -fmad=false, -ftz=false and -prec-div=true say the same for whatever is not.
#pragma once

#ifndef QLF_ON_CPU
#define QLF_TABLE static __device__ const
#endif
#include "qlf/codebook.h"

namespace qlf {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 kThreads = 256;                     // of every thread block; the host launches no other size
constexpr u32 kNestedShift = 8;                   // log2 of nested_blocksize
constexpr u32 kSmallestDivisorBits = 0x006ce3ee;  // bits of 1e-38f (spec, "Encoding")
constexpr u32 kInfinity = 0x7f800000;
constexpr u32 kMagnitude = 0x7fffffff;

constexpr u32 kFp4 = 1;  // quant_type arguments: 0 is nf4

__device__ __forceinline__ bool is_vector_aligned(const void* p) {
  return (reinterpret_cast<u64>(p) & 15) == 0;
}

// Elements of the dense tensor. pack2 puts two rounded values into the 32 bits that two neighbours take in memory.
#ifdef QLF_ON_CPU
__device__ inline u32 bfloat16_pair(float first, float second) {
  return bfloat_of(first) | bfloat_of(second) << 16;
}
__device__ inline u32 float16_pair(float first, float second) {
  return half_of(first) | half_of(second) << 16;
}
__device__ inline float float16_value(u32 bits) {
  return half_to_float(bits);
}
#else
// One instruction for two elements; the first operand of the instruction is the upper half. sm_80 or newer.
__device__ __forceinline__ u32 bfloat16_pair(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ u32 float16_pair(float first, float second) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ float float16_value(u32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(bits)));
  return value;
}
#endif

struct BFloat16 {
  typedef u16 Bits;
  static __device__ __forceinline__ u32 pair(float first, float second) { return bfloat16_pair(first, second); }
  static __device__ __forceinline__ float value(u32 bits) { return __uint_as_float(bits << 16); }
};

struct Float16 {
  typedef u16 Bits;
  static __device__ __forceinline__ u32 pair(float first, float second) { return float16_pair(first, second); }
  static __device__ __forceinline__ float value(u32 bits) { return float16_value(bits); }
};

struct Float32 {
  typedef u32 Bits;
  static __device__ __forceinline__ float value(u32 bits) { return __uint_as_float(bits); }
};

}  // namespace qlf

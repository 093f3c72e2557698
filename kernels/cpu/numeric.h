// Exact scalar conversions between float32, float16, bfloat16 and their bits, independent of the processor.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "qlf/codebook.h"
#include "qlf/qlf.h"

namespace qlf {
namespace {

// Reciprocals are taken of at least this (spec, "Encoding"): 1 / 1e-38f is finite.
constexpr float kSmallestDivisor = 1e-38f;

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load_f32(const uint8_t* p) {
  float value;
  memcpy(&value, p, sizeof value);
  return value;
}

inline uint32_t load_u16(const uint8_t* p) {
  uint16_t value;
  memcpy(&value, p, sizeof value);
  return value;
}

inline uint32_t load_u32(const uint8_t* p) {
  uint32_t value;
  memcpy(&value, p, sizeof value);
  return value;
}

inline void store_f32(uint8_t* p, float value) {
  memcpy(p, &value, sizeof value);
}

inline float half_to_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude < 0x0400u) return float_of(bits_of(static_cast<float>(magnitude) * 0x1p-24f) | sign);
  const uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // infinities and NaN keep exponent ones
  return float_of(((magnitude << 13) + rebias) | sign);
}

// Nearest float16, ties to even; too large becomes infinity.
inline uint32_t half_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // at least halfway between 65504 and 65536
  if (magnitude < 0x38800000u) {
    // Adding 0.5 makes float32's own rounding fall on the float16 subnormal grid.
    return sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | ((magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13);
}

// Nearest bfloat16, ties to even.
inline uint32_t bfloat_of(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline size_t size_of(int32_t dtype) {
  return dtype == QLF_FLOAT32 ? 4 : 2;
}

// Bits of |x| order like |x|, so a block's absmax is an integer maximum; the largest finite value per dtype ends it.
template <int kDtype>
inline uint32_t magnitude_bits(const uint8_t* p) {
  return kDtype == QLF_FLOAT32 ? load_u32(p) & 0x7fffffffu : load_u16(p) & 0x7fffu;
}

template <int kDtype>
constexpr uint32_t kInfinityBits = kDtype == QLF_FLOAT32   ? 0x7f800000u
                                   : kDtype == QLF_FLOAT16 ? 0x7c00u
                                                           : 0x7f80u;

// Widen the bits of an element exactly.
template <int kDtype>
inline float widen(uint32_t bits) {
  if (kDtype == QLF_FLOAT32) return float_of(bits);
  if (kDtype == QLF_FLOAT16) return half_to_float(bits);
  return float_of(bits << 16);
}

template <int kDtype>
inline float load_element(const uint8_t* p) {
  return widen<kDtype>(kDtype == QLF_FLOAT32 ? load_u32(p) : load_u16(p));
}

template <int kDtype>
inline void store_element(uint8_t* p, float value) {
  if (kDtype == QLF_FLOAT32) {
    store_f32(p, value);
  } else {
    const uint16_t bits = static_cast<uint16_t>(kDtype == QLF_FLOAT16 ? half_of(value) : bfloat_of(value));
    memcpy(p, &bits, sizeof bits);
  }
}

}  // namespace
}  // namespace qlf

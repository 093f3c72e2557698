// Adding low-rank deltas to weights, and conversions between dtypes: what merge.cpp and the instruction sets share.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "numeric.h"

namespace qlf {

// Elements [first, first + n) of a matrix of `columns` columns: out = base + scale * (left @ right), rounded once.
// With rank 0, out = base. Pointers are bytes: they may have any alignment. `base` and `out` point at element `first`.
struct MergeJob {
  const uint8_t* base;
  int32_t base_dtype;
  size_t columns;
  size_t first;
  size_t n;
  const uint8_t* left;   // float32 [rows][rank], of the whole matrix
  const uint8_t* right;  // float32 [rank][columns]
  size_t rank;
  float scale;
  uint8_t* out;
  int32_t out_dtype;
};

using MergeKernel = bool (*)(const MergeJob&);  // whether a finite value became infinite as float16

bool merge_scalar(const MergeJob& job);
bool merge_avx2(const MergeJob& job);

namespace {

// a * b + c, rounded once, whether the processor has such an instruction or not.
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in double. Its sum with c is rounded to odd: where it is inexact, to the neighbour whose last
  // bit is 1. A double has more than two bits beyond a float, so rounding that again gives what one rounding would.
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  double sum = product + addend;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (addend - part);
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  const bool finite = (bits >> 52 & 0x7ff) != 0x7ff;
  if (finite && error != 0.0 && (bits & 1) == 0) {
    bits += (error > 0.0) == (sum > 0.0) ? 1 : uint64_t(-1);
    memcpy(&sum, &bits, sizeof sum);
  }
  return static_cast<float>(sum);
#endif
}

inline bool overflows_half(float value) {
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  return magnitude >= 0x477ff000u && magnitude < 0x7f800000u;
}

// A NaN keeps its sign and the upper bits of its payload, as in NumPy; an arithmetic instruction would make it quiet.
inline uint32_t half_of_nan(uint32_t bits) {
  const uint32_t payload = (bits >> 13) & 0x3ffu;
  return ((bits >> 16) & 0x8000u) | 0x7c00u | (payload ? payload : 1u);
}

template <int kFrom, int kTo>
inline bool merge_element(const MergeJob& job, size_t index, float delta) {
  float value = load_element<kFrom>(job.base + index * (kFrom == QLF_FLOAT32 ? 4 : 2));
  if (job.rank) value += delta;
  uint8_t* out = job.out + index * (kTo == QLF_FLOAT32 ? 4 : 2);
  if (kTo == QLF_FLOAT16 && (bits_of(value) & 0x7fffffffu) > 0x7f800000u) {
    const uint16_t half = static_cast<uint16_t>(half_of_nan(bits_of(value)));
    memcpy(out, &half, sizeof half);
    return false;
  }
  store_element<kTo>(out, value);
  return kTo == QLF_FLOAT16 && overflows_half(value);
}

// Columns [begin, end) of a row, one after another; what is left of the vectors.
template <int kFrom, int kTo>
inline bool merge_columns(const MergeJob& job, size_t row, size_t begin, size_t end) {
  bool overflowed = false;
  for (size_t column = begin; column < end; ++column) {
    float sum = 0.0f;
    for (size_t k = 0; k < job.rank; ++k) {
      const float factor = load_f32(job.left + (row * job.rank + k) * 4);
      sum = fused(factor, load_f32(job.right + (k * job.columns + column) * 4), sum);
    }
    overflowed |= merge_element<kFrom, kTo>(job, row * job.columns + column - job.first, sum * job.scale);
  }
  return overflowed;
}

// The range as rectangles: the end of its first row, whole rows, the begin of its last row. `Isa` brings
// merge<from, to>(job, row, rows, begin, end) for columns [begin, end) of some rows, and convert<from, to>(job).
template <class Isa, int kFrom, int kTo>
bool merge_rows(const MergeJob& job) {
  if (job.rank == 0) return Isa::template convert<kFrom, kTo>(job);
  const size_t columns = job.columns, last = job.first + job.n;
  size_t row = job.first / columns;
  bool overflowed = false;
  if (job.first % columns) {
    const size_t end = last < (row + 1) * columns ? last - row * columns : columns;
    overflowed |= Isa::template merge<kFrom, kTo>(job, row, 1, job.first % columns, end);
    ++row;
  }
  if (last / columns > row) overflowed |= Isa::template merge<kFrom, kTo>(job, row, last / columns - row, 0, columns);
  if (last / columns >= row && last % columns) {
    overflowed |= Isa::template merge<kFrom, kTo>(job, last / columns, 1, 0, last % columns);
  }
  return overflowed;
}

template <class Isa, int kFrom>
bool merge_from(const MergeJob& job) {
  switch (job.out_dtype) {
    case QLF_FLOAT32:
      return merge_rows<Isa, kFrom, QLF_FLOAT32>(job);
    case QLF_FLOAT16:
      return merge_rows<Isa, kFrom, QLF_FLOAT16>(job);
    default:
      return merge_rows<Isa, kFrom, QLF_BFLOAT16>(job);
  }
}

template <class Isa>
bool merge_with(const MergeJob& job) {
  switch (job.base_dtype) {
    case QLF_FLOAT32:
      return merge_from<Isa, QLF_FLOAT32>(job);
    case QLF_FLOAT16:
      return merge_from<Isa, QLF_FLOAT16>(job);
    default:
      return merge_from<Isa, QLF_BFLOAT16>(job);
  }
}

}  // namespace
}  // namespace qlf

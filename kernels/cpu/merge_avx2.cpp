// Merging and converting with AVX2, F16C and FMA: 8 float32 lanes.
#include <immintrin.h>

#include "merge.h"

namespace qlf {
namespace {

constexpr size_t kLanes = 8, kStrip = 16;
constexpr size_t kTileColumns = 256;   // at a time: their part of `right` stays in the L1 cache
constexpr size_t kPanelFloats = 8192;  // room for it; a larger rank reads `right` where it is

struct Avx2 {
  template <int kDtype>
  static inline __m256 load8(const uint8_t* p) {
    if (kDtype == QLF_FLOAT32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (kDtype == QLF_FLOAT16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static inline __m256i overflow_of(__m256i bits) {
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    return _mm256_and_si256(_mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x477fefff)),
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(0x7f800000), magnitude));
  }

  template <int kDtype>
  static inline void store8(uint8_t* p, __m256 value, __m256i& overflowed) {
    const __m256i bits = _mm256_castps_si256(value);
    __m128i narrow;
    if (kDtype == QLF_FLOAT32) return _mm256_storeu_ps(reinterpret_cast<float*>(p), value);
    if (kDtype == QLF_FLOAT16) {
      overflowed = _mm256_or_si256(overflowed, overflow_of(bits));
      narrow = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      const __m256i upper = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
      const __m256i packed = _mm256_packus_epi32(upper, upper);
      narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
  }

  static inline bool any(__m256i flags) { return !_mm256_testz_si256(flags, flags); }

  // The instructions for float16 make a NaN quiet, so a vector with one is left to the scalar code.
  template <int kFrom, int kTo>
  static bool convert(const MergeJob& job) {
    const size_t from = kFrom == QLF_FLOAT32 ? 4 : 2, to = kTo == QLF_FLOAT32 ? 4 : 2;
    __m256i flags = _mm256_setzero_si256();
    bool overflowed = false;
    size_t i = 0;
    for (; i + kLanes <= job.n; i += kLanes) {
      const __m256 value = load8<kFrom>(job.base + i * from);
      if (_mm256_movemask_ps(_mm256_cmp_ps(value, value, _CMP_UNORD_Q))) {
        for (size_t lane = i; lane < i + kLanes; ++lane) overflowed |= merge_element<kFrom, kTo>(job, lane, 0.0f);
      } else {
        store8<kTo>(job.out + i * to, value, flags);
      }
    }
    for (; i < job.n; ++i) overflowed |= merge_element<kFrom, kTo>(job, i, 0.0f);
    return overflowed || any(flags);
  }

  // kRows rows of 16 columns. `right` holds row k of the strip at k * stride.
  template <int kFrom, int kTo, size_t kRows>
  static inline void strip(const MergeJob& job, const uint8_t* right, size_t stride, size_t row, size_t column,
                           __m256i& flags) {
    __m256 sums[kRows][2];
    for (size_t i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
    const uint8_t* left = job.left + row * job.rank * 4;
    for (size_t k = 0; k < job.rank; ++k) {
      const __m256 a = load8<QLF_FLOAT32>(right + k * stride), b = load8<QLF_FLOAT32>(right + k * stride + 32);
      for (size_t i = 0; i < kRows; ++i) {
        const __m256 factor = _mm256_set1_ps(load_f32(left + (i * job.rank + k) * 4));
        sums[i][0] = _mm256_fmadd_ps(factor, a, sums[i][0]);
        sums[i][1] = _mm256_fmadd_ps(factor, b, sums[i][1]);
      }
    }
    const __m256 scale = _mm256_set1_ps(job.scale);
    for (size_t i = 0; i < kRows; ++i) {
      const size_t at = (row + i) * job.columns + column - job.first;
      for (size_t half = 0; half < 2; ++half) {
        const size_t index = at + half * kLanes;
        const __m256 base = load8<kFrom>(job.base + index * (kFrom == QLF_FLOAT32 ? 4 : 2));
        const __m256 value = _mm256_add_ps(base, _mm256_mul_ps(sums[i][half], scale));
        store8<kTo>(job.out + index * (kTo == QLF_FLOAT32 ? 4 : 2), value, flags);
      }
    }
  }

  template <int kFrom, int kTo>
  static bool merge(const MergeJob& job, size_t row, size_t rows, size_t begin, size_t end) {
    alignas(64) uint8_t panel[kPanelFloats * 4];
    const size_t whole = begin + (end - begin) / kStrip * kStrip;
    const size_t fitting = kPanelFloats / job.rank / kStrip * kStrip;
    // Copying a part of `right` pays when several rows use it.
    const bool packed = fitting >= kStrip && rows >= 8;
    const size_t width = packed && fitting < kTileColumns ? fitting : kTileColumns;
    const size_t stride = packed ? kStrip * 4 : job.columns * 4;
    __m256i flags = _mm256_setzero_si256();
    for (size_t tile = begin; tile < whole; tile += width) {
      const size_t stop = tile + width < whole ? tile + width : whole;
      const uint8_t* right = job.right + tile * 4;
      if (packed) right = pack(job, panel, tile, stop);
      const size_t next = packed ? job.rank * kStrip * 4 : kStrip * 4;  // from one strip to its neighbour
      size_t i = 0;
      for (; i + 4 <= rows; i += 4) {
        for (size_t c = tile; c < stop; c += kStrip) {
          strip<kFrom, kTo, 4>(job, right + (c - tile) / kStrip * next, stride, row + i, c, flags);
        }
      }
      for (; i < rows; ++i) {
        for (size_t c = tile; c < stop; c += kStrip) {
          strip<kFrom, kTo, 1>(job, right + (c - tile) / kStrip * next, stride, row + i, c, flags);
        }
      }
    }
    bool overflowed = any(flags);
    for (size_t i = 0; i < rows; ++i) overflowed |= merge_columns<kFrom, kTo>(job, row + i, whole, end);
    return overflowed;
  }

  // Columns [begin, end) of `right`, strip by strip: rows of a wide matrix lie in the same sets of the L1 cache.
  static const uint8_t* pack(const MergeJob& job, uint8_t* panel, size_t begin, size_t end) {
    uint8_t* out = panel;
    for (size_t column = begin; column < end; column += kStrip) {
      for (size_t k = 0; k < job.rank; ++k, out += kStrip * 4) {
        memcpy(out, job.right + (k * job.columns + column) * 4, kStrip * 4);
      }
    }
    return panel;
  }
};

}  // namespace

bool merge_avx2(const MergeJob& job) {
  return merge_with<Avx2>(job);
}

}  // namespace qlf

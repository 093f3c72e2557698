// Pieces that the AVX2 and AVX-512 files share: 256-bit code only.
#pragma once

#ifdef QLF_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#else
#include <immintrin.h>
#endif

#include "blocks.h"

namespace qlf {
namespace {

#define QLF_INLINE inline __attribute__((always_inline))

QLF_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
QLF_INLINE __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

// Two 128-bit halves, 8 entries apart: entries first..first+3 and first+8..first+11 of a 16-entry float32 table.
QLF_INLINE __m256 split_entries(const unsigned* table, size_t first) {
  return _mm256_castsi256_ps(
      _mm256_inserti128_si256(_mm256_castsi128_si256(load128(table + first)), load128(table + first + 8), 1));
}

QLF_INLINE uint32_t max_of_u16(__m256i v) {
  const __m128i folded = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i ones = _mm_set1_epi32(-1);
  return ~static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(folded, ones)))) & 0xffffu;
}

QLF_INLINE uint32_t max_of_u32(__m256i v) {
  __m128i folded = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  folded = _mm_max_epu32(folded, _mm_shuffle_epi32(folded, 0x4e));
  folded = _mm_max_epu32(folded, _mm_shuffle_epi32(folded, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(folded));
}

// The last two folds of the moments (lanes l + 2, then l + 1), all three sums at once.
QLF_INLINE void store_folded(uint8_t* out, __m128 a, __m128 b, __m128 c) {
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  const __m128 cc = _mm_add_ps(c, _mm_movehl_ps(c, c));
  const __m128 even = _mm_shuffle_ps(ab, cc, _MM_SHUFFLE(0, 0, 2, 0));
  const __m128 odd = _mm_shuffle_ps(ab, cc, _MM_SHUFFLE(1, 1, 3, 1));
  float folded[4];
  _mm_storeu_ps(folded, _mm_add_ps(even, odd));
  memcpy(out, folded, 12);
}

// Nearest bfloat16 in the low half of each lane.
QLF_INLINE __m256i bfloat_lanes(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}

// The 16 scaled codebook values narrowed to 16 bits, in order. low and high come from split_entries(values, 0 | 4).
template <int kDtype>
QLF_INLINE __m256i narrow_table(__m256 low, __m256 high) {
  if (kDtype == QLF_BFLOAT16) return _mm256_packus_epi32(bfloat_lanes(low), bfloat_lanes(high));
  const __m128i a = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
  const __m128i b = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi64(a, b)), _mm_unpackhi_epi64(a, b), 1);
}

}  // namespace
}  // namespace qlf

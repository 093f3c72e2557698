// AVX-512 (F, BW, DQ, VL) kernels: 16 float32 lanes, so one vector is one step of the moments' sixteen lanes.
//
// With QLF_SIMDE the same source is compiled against SIMDe's portable emulation of these intrinsics, which lets the
// tests check it on processors without AVX-512. Only intrinsics that SIMDe 0.7.4 has are used.
#include "x86_tables.h"

namespace qlf {
namespace {

QLF_INLINE __m512i load512(const void* p) {
  return _mm512_loadu_si512(p);
}

struct Avx512 {
  struct Pair {
    __m512 first, second;  // elements 0-15 and 16-31
  };

  static QLF_INLINE __m512 half_lanes(const uint8_t* src) {
    const __m256 a = _mm256_cvtph_ps(load128(src)), b = _mm256_cvtph_ps(load128(src + 16));
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(a)), _mm256_castps_pd(b), 1));
  }

  template <int kDtype>
  static uint32_t max_bits(const uint8_t* src, size_t count) {
    const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
    __m512i largest = _mm512_setzero_si512();
    for (size_t at = 0; at < count * size; at += 64) {
      const __m512i bits = load512(src + at);
      if (kDtype == QLF_FLOAT32) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
      } else {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
      }
    }
    const __m256i a = _mm512_castsi512_si256(largest), b = _mm512_extracti64x4_epi64(largest, 1);
    return kDtype == QLF_FLOAT32 ? max_of_u32(_mm256_max_epu32(a, b)) : max_of_u16(_mm256_max_epu16(a, b));
  }

  struct Sums {
    __m512 xx = _mm512_setzero_ps(), xc = _mm512_setzero_ps(), cc = _mm512_setzero_ps();

    QLF_INLINE void add(__m512 x, __m512 c) {
      xx = _mm512_add_ps(xx, _mm512_mul_ps(x, x));
      xc = _mm512_add_ps(xc, _mm512_mul_ps(x, c));
      cc = _mm512_add_ps(cc, _mm512_mul_ps(c, c));
    }

    static QLF_INLINE __m128 fold_to_4(__m512 sum) {
      const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1));
      const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sum), upper);
      return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    }

    QLF_INLINE void store(uint8_t* out) const { store_folded(out, fold_to_4(xx), fold_to_4(xc), fold_to_4(cc)); }
  };

  // Four rounds of binary search: a permute fetches each lane's next threshold by the rank so far.
  struct Encoder {
    __m512 half;       // threshold 7
    __m512 pivots[3];  // rounds 2 to 4: threshold r + 3, r + 1, r at place r
    __m512 values;     // by rank
    __m512i codes;     // by rank, in the low byte of each word

    explicit Encoder(const Codebook4& book) {
      alignas(64) float value[16], pivot[3][16];
      alignas(64) uint8_t code[64];
      const size_t ahead[3] = {3, 1, 0};
      for (size_t r = 0; r < 16; ++r) {
        value[r] = float_of(book.values[book.order[r]]);
        for (size_t k = 0; k < 3; ++k) {
          pivot[k][r] = r + ahead[k] < 15 ? float_of(book.thresholds[r + ahead[k]]) : 0.0f;
        }
        for (size_t lane = 0; lane < 64; lane += 16) code[lane + r] = book.order[r];
      }
      half = _mm512_set1_ps(float_of(book.thresholds[7]));
      for (size_t k = 0; k < 3; ++k) pivots[k] = _mm512_loadu_ps(pivot[k]);
      values = _mm512_loadu_ps(value);
      codes = load512(code);
    }

    QLF_INLINE __m512i rank_of(__m512 scaled) const {
      __m512i rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(scaled, half, _CMP_GT_OQ), 8);
      for (int k = 0; k < 3; ++k) {
        const auto above = _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(rank, pivots[k]), _CMP_GT_OQ);
        rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(4 >> k));
      }
      return rank;
    }

    template <int kDtype>
    static QLF_INLINE Pair load32(const uint8_t* src) {
      if (kDtype == QLF_FLOAT32) {
        return {_mm512_castsi512_ps(load512(src)), _mm512_castsi512_ps(load512(src + 64))};
      }
      if (kDtype == QLF_FLOAT16) return {half_lanes(src), half_lanes(src + 32)};
      // bfloat16: element k into the upper word of lane k, zero into the lower.
      const __m512i bits = load512(src);
      const __m512i first = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                             7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
      const __m512i second = _mm512_or_si512(first, _mm512_set1_epi16(16));
      return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, first, bits)),
              _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, second, bits))};
    }

    // Nibbles of 16-bit lanes in the order that packus leaves (elements 4k..4k+3, 16+4k..16+4k+3 in 128-bit
    // lane k) to 16 bytes in element order.
    static QLF_INLINE __m128i pack_nibbles(__m512i code) {
      const __m512i bytes = _mm512_or_si512(_mm512_slli_epi32(code, 4), _mm512_srli_epi32(code, 16));
      const __m512i gathered = _mm512_shuffle_epi8(bytes, _mm512_set1_epi32(0x0c080400));
      const __m512i lanes =
          _mm512_permutexvar_epi32(_mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0), gathered);
      const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      return _mm_shuffle_epi8(_mm512_castsi512_si128(lanes), order);
    }

    template <int kDtype, bool kMoments>
    QLF_INLINE void encode_block(const uint8_t* src, size_t count, float reciprocal, uint8_t* packed,
                                 uint8_t* moments) const {
      const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
      Sums sums;
      for (size_t at = 0; at < count; at += kStep) {
        encode<kDtype, kMoments>(src + at * size, reciprocal, packed + at / 2, sums);
      }
      if (kMoments) sums.store(moments);
    }

    template <int kDtype, bool kMoments>
    QLF_INLINE void encode(const uint8_t* src, float reciprocal, uint8_t* packed, Sums& sums) const {
      const Pair x = load32<kDtype>(src);
      const __m512 factor = _mm512_set1_ps(reciprocal);
      const __m512i first = rank_of(_mm512_mul_ps(x.first, factor));
      const __m512i second = rank_of(_mm512_mul_ps(x.second, factor));
      const __m512i rank = _mm512_packus_epi32(first, second);
      const __m512i code = _mm512_maskz_shuffle_epi8(0x5555555555555555u, codes, rank);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), pack_nibbles(code));
      if (kMoments) {
        sums.add(x.first, _mm512_permutexvar_ps(first, values));
        sums.add(x.second, _mm512_permutexvar_ps(second, values));
      }
    }
  };

  template <bool kStream>
  static QLF_INLINE void put(uint8_t* out, __m512i v) {
#ifndef QLF_SIMDE  // which has no 512-bit streaming store
    if (kStream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(out), v);
#endif
    _mm512_storeu_si512(out, v);
  }

  // A permute looks each element's scaled value up. It reads only the low bits of an index, so a byte needs no
  // masking: whole for its low nibble (4 bits, or a fifth into a doubled table), shifted for its high one.
  template <int kDtype>
  struct Decoder {
    struct Table {
      __m512i entries;

      template <bool kStream>
      QLF_INLINE void decode(const uint8_t* packed, uint8_t* out) const {
        const __m512i bytes = _mm512_broadcast_i32x4(load128(packed));
        if (kDtype != QLF_FLOAT32) {
          const __m512i spread = _mm512_set_epi8(-1, 15, -1, 15, -1, 14, -1, 14, -1, 13, -1, 13, -1, 12, -1, 12,  //
                                                 -1, 11, -1, 11, -1, 10, -1, 10, -1, 9, -1, 9, -1, 8, -1, 8,      //
                                                 -1, 7, -1, 7, -1, 6, -1, 6, -1, 5, -1, 5, -1, 4, -1, 4,          //
                                                 -1, 3, -1, 3, -1, 2, -1, 2, -1, 1, -1, 1, -1, 0, -1, 0);
          const __m512i twice = _mm512_shuffle_epi8(bytes, spread);
          const __m512i code = _mm512_srlv_epi16(twice, _mm512_set1_epi32(4));
          put<kStream>(out, _mm512_permutexvar_epi16(code, entries));
          return;
        }
        const __m512i spread = _mm512_set_epi8(-1, -1, -1, 7, -1, -1, -1, 7, -1, -1, -1, 6, -1, -1, -1, 6,  //
                                               -1, -1, -1, 5, -1, -1, -1, 5, -1, -1, -1, 4, -1, -1, -1, 4,  //
                                               -1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1, 2, -1, -1, -1, 2,  //
                                               -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 0, -1, -1, -1, 0);
        const __m512i shift = _mm512_set1_epi64(4);
        const __m512i later = _mm512_or_si512(spread, _mm512_set1_epi32(8));
        const __m512i first = _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, spread), shift);
        const __m512i second = _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, later), shift);
        put<kStream>(out, _mm512_permutexvar_epi32(first, entries));
        put<kStream>(out + 64, _mm512_permutexvar_epi32(second, entries));
      }
    };

    const Codebook4& codebook;
    explicit Decoder(const Codebook4& book) : codebook(book) {}

    QLF_INLINE Table scale(float absmax) const {
      if (kDtype == QLF_FLOAT32) {
        const __m512 values = _mm512_castsi512_ps(load512(codebook.values));
        return {_mm512_castps_si512(_mm512_mul_ps(values, _mm512_set1_ps(absmax)))};
      }
      const __m256 factor = _mm256_set1_ps(absmax);
      const __m256 low = _mm256_mul_ps(split_entries(codebook.values, 0), factor);
      const __m256 high = _mm256_mul_ps(split_entries(codebook.values, 4), factor);
      return {_mm512_broadcast_i64x4(narrow_table<kDtype>(low, high))};
    }
  };

  static QLF_INLINE void fence() { _mm_sfence(); }
};

}  // namespace

const Kernels avx512_kernels = {encode<Avx512>, decode<Avx512>};

}  // namespace qlf

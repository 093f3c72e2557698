// AVX2 + F16C kernels: 8 float32 lanes.
//
// Sixteen consecutive elements are held as two vectors, "low" = elements 0-3 and 8-11, "high" = 4-7 and 12-15: the
// order in which unpack and pack work within 128-bit halves, so that widening and packing need no lane crossing.
#include "x86_tables.h"

namespace qlf {
namespace {

struct Avx2 {
  struct Pair {
    __m256 low, high;
  };

  template <int kDtype>
  static QLF_INLINE Pair load16(const uint8_t* src) {
    if (kDtype == QLF_FLOAT32) {
      const __m256 a = _mm256_castsi256_ps(load256(src)), b = _mm256_castsi256_ps(load256(src + 32));
      return {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
    }
    const __m256i bits = load256(src);
    if (kDtype == QLF_BFLOAT16) {
      const __m256i zero = _mm256_setzero_si256();
      return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, bits)),
              _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, bits))};
    }
    const __m256i ordered = _mm256_permute4x64_epi64(bits, 0xd8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(ordered)), _mm256_cvtph_ps(_mm256_extracti128_si256(ordered, 1))};
  }

  template <int kDtype>
  static QLF_INLINE uint32_t max_bits(const uint8_t* src, size_t count) {
    const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
    __m256i largest = _mm256_setzero_si256();
    for (size_t at = 0; at < count * size; at += 32) {
      const __m256i bits = load256(src + at);
      if (kDtype == QLF_FLOAT32) {
        largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
      } else {
        largest = _mm256_max_epu16(largest, _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
      }
    }
    return kDtype == QLF_FLOAT32 ? max_of_u32(largest) : max_of_u16(largest);
  }

  struct Sums {
    Pair xx{_mm256_setzero_ps(), _mm256_setzero_ps()};
    Pair xc{_mm256_setzero_ps(), _mm256_setzero_ps()};
    Pair cc{_mm256_setzero_ps(), _mm256_setzero_ps()};

    static QLF_INLINE void accumulate(Pair& sum, const Pair& a, const Pair& b) {
      sum.low = _mm256_add_ps(sum.low, _mm256_mul_ps(a.low, b.low));
      sum.high = _mm256_add_ps(sum.high, _mm256_mul_ps(a.high, b.high));
    }

    QLF_INLINE void add(const Pair& x, const Pair& c) {
      accumulate(xx, x, x);
      accumulate(xc, x, c);
      accumulate(cc, c, c);
    }

    // Lanes l + 8 are the upper halves; lanes l + 4 are in `high`.
    static QLF_INLINE __m128 fold_to_4(const Pair& sum) {
      const __m128 low = _mm_add_ps(_mm256_castps256_ps128(sum.low), _mm256_extractf128_ps(sum.low, 1));
      const __m128 high = _mm_add_ps(_mm256_castps256_ps128(sum.high), _mm256_extractf128_ps(sum.high, 1));
      return _mm_add_ps(low, high);
    }

    QLF_INLINE void store(uint8_t* out) const { store_folded(out, fold_to_4(xx), fold_to_4(xc), fold_to_4(cc)); }
  };

  // Four rounds of binary search, held as minus the rank because a true comparison is -1. A permute takes its index
  // modulo the table's size, so tables hold the entry of rank r at place -r.
  struct Encoder {
    __m256 quarter[3];  // thresholds 3, 7, 11
    __m256 eighths;     // threshold 4 r + 1 at place -r mod 4
    __m256 sixteenths;  // threshold 2 r at place -r mod 8
    __m256i codes;      // code of rank r at byte -r mod 16
    __m256i planes[4];  // byte k of each code's value

    explicit Encoder(const Codebook4& book) {
      float eighth[8], sixteenth[8];
      uint8_t code[32], plane[4][32];
      for (size_t i = 0; i < 3; ++i) quarter[i] = _mm256_set1_ps(float_of(book.thresholds[4 * i + 3]));
      for (size_t r = 0; r < 8; ++r) eighth[(8 - r) % 4 + (r & 4)] = float_of(book.thresholds[4 * (r % 4) + 1]);
      for (size_t r = 0; r < 8; ++r) sixteenth[(8 - r) % 8] = float_of(book.thresholds[2 * r]);
      for (size_t r = 0; r < 32; ++r) {
        code[(32 - r) % 16 + (r & 16)] = book.order[r % 16];
        for (size_t k = 0; k < 4; ++k) plane[k][r] = static_cast<uint8_t>(book.values[r % 16] >> (8 * k));
      }
      eighths = _mm256_loadu_ps(eighth);
      sixteenths = _mm256_loadu_ps(sixteenth);
      codes = load256(code);
      for (size_t k = 0; k < 4; ++k) planes[k] = load256(plane[k]);
    }

    QLF_INLINE __m256i above(__m256 value, __m256 threshold) const {
      return _mm256_castps_si256(_mm256_cmp_ps(value, threshold, _CMP_GT_OQ));
    }

    // Minus the number of thresholds below each value. Clamping to [-1, 1] would not change it: all lie inside.
    QLF_INLINE __m256i minus_rank(__m256 value) const {
      __m256i rank = _mm256_add_epi32(above(value, quarter[0]), above(value, quarter[1]));
      rank = _mm256_add_epi32(rank, above(value, quarter[2]));
      const __m256i third = above(value, _mm256_permutevar_ps(eighths, rank));
      rank = _mm256_add_epi32(_mm256_add_epi32(rank, rank), third);
      const __m256i fourth = above(value, _mm256_permutevar8x32_ps(sixteenths, rank));
      return _mm256_add_epi32(_mm256_add_epi32(rank, rank), fourth);
    }

    QLF_INLINE __m256i minus_ranks(const Pair& x, __m256 reciprocal) const {
      return _mm256_packs_epi32(minus_rank(_mm256_mul_ps(x.low, reciprocal)),
                                minus_rank(_mm256_mul_ps(x.high, reciprocal)));
    }

    // Codes of 32 elements, one a byte: elements 0-7, 16-23 | 8-15, 24-31.
    template <int kDtype>
    QLF_INLINE __m256i codes_of(const uint8_t* src, __m256 reciprocal) const {
      const Pair x0 = load16<kDtype>(src), x1 = load16<kDtype>(src + (kDtype == QLF_FLOAT32 ? 64 : 32));
      const __m256i ranks = _mm256_packs_epi16(minus_ranks(x0, reciprocal), minus_ranks(x1, reciprocal));
      return _mm256_shuffle_epi8(codes, _mm256_and_si256(ranks, _mm256_set1_epi8(15)));
    }

    static QLF_INLINE void pack_nibbles(__m256i code, uint8_t* packed) {
      const __m256i bytes = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x0110));
      const __m256i narrow = _mm256_packus_epi16(bytes, bytes);
      const __m256i ordered = _mm256_permutevar8x32_epi32(narrow, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(ordered));
    }

    // The moments take a second loop over the block: with sixteen registers, one loop would keep its sums in
    // memory.
    template <int kDtype, bool kMoments>
    QLF_INLINE void encode_block(const uint8_t* src, size_t count, float reciprocal, uint8_t* packed,
                                 uint8_t* moments) const {
      const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
      alignas(32) uint8_t kept[kMoments ? kMaxBlocksize : 32];
      const __m256 factor = _mm256_set1_ps(reciprocal);
      for (size_t at = 0; at < count; at += kStep) {
        const __m256i code = codes_of<kDtype>(src + at * size, factor);
        pack_nibbles(code, packed + at / 2);
        if (kMoments) _mm256_store_si256(reinterpret_cast<__m256i*>(kept + at), code);
      }
      if (!kMoments) return;
      Sums sums;
      for (size_t at = 0; at < count; at += kStep) add_moments<kDtype>(src + at * size, load256(kept + at), sums);
      sums.store(moments);
    }

    // The value of each code, looked up byte by byte; the unpacks restore the order of load16.
    template <int kDtype>
    QLF_INLINE void add_moments(const uint8_t* src, __m256i code, Sums& sums) const {
      const __m256i p0 = _mm256_shuffle_epi8(planes[0], code), p1 = _mm256_shuffle_epi8(planes[1], code);
      const __m256i p2 = _mm256_shuffle_epi8(planes[2], code), p3 = _mm256_shuffle_epi8(planes[3], code);
      const __m256i low0 = _mm256_unpacklo_epi8(p0, p1), high0 = _mm256_unpacklo_epi8(p2, p3);
      const __m256i low1 = _mm256_unpackhi_epi8(p0, p1), high1 = _mm256_unpackhi_epi8(p2, p3);
      sums.add(load16<kDtype>(src), {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0)),
                                     _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0))});
      sums.add(load16<kDtype>(src + (kDtype == QLF_FLOAT32 ? 64 : 32)),
               {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1))});
    }
  };

  template <bool kStream>
  static QLF_INLINE void put(uint8_t* out, __m256i v) {
    if (kStream) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out), v);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v);
    }
  }

  // One 16-byte shuffle table per byte of the output element; a block's 16 results are looked up, not computed.
  template <int kDtype>
  struct Decoder {
    static constexpr size_t kPlanes = kDtype == QLF_FLOAT32 ? 4 : 2;

    struct Table {
      __m256i planes[4];
      __m256i spread;

      template <bool kStream>
      QLF_INLINE void decode(const uint8_t* packed, uint8_t* out) const {
        // Each byte twice, in the order that the unpacks below undo; then its high and its low nibble.
        const __m256i twice = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(packed)), spread);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi16(twice, 4), _mm256_set1_epi16(0x000f));
        const __m256i odd = _mm256_and_si256(twice, _mm256_set1_epi16(0x0f00));
        const __m256i code = _mm256_or_si256(even, odd);
        const __m256i p0 = _mm256_shuffle_epi8(planes[0], code), p1 = _mm256_shuffle_epi8(planes[1], code);
        const __m256i low = _mm256_unpacklo_epi8(p0, p1), high = _mm256_unpackhi_epi8(p0, p1);
        if (kDtype != QLF_FLOAT32) {
          put<kStream>(out, low);
          put<kStream>(out + 32, high);
          return;
        }
        const __m256i p2 = _mm256_shuffle_epi8(planes[2], code), p3 = _mm256_shuffle_epi8(planes[3], code);
        const __m256i low2 = _mm256_unpacklo_epi8(p2, p3), high2 = _mm256_unpackhi_epi8(p2, p3);
        put<kStream>(out, _mm256_unpacklo_epi16(low, low2));
        put<kStream>(out + 32, _mm256_unpackhi_epi16(low, low2));
        put<kStream>(out + 64, _mm256_unpacklo_epi16(high, high2));
        put<kStream>(out + 96, _mm256_unpackhi_epi16(high, high2));
      }
    };

    __m256 low, high;

    explicit Decoder(const Codebook4& book) : low(split_entries(book.values, 0)), high(split_entries(book.values, 4)) {}

    QLF_INLINE Table scale(float absmax) const {
      const __m256 factor = _mm256_set1_ps(absmax);
      const __m256 a = _mm256_mul_ps(low, factor), b = _mm256_mul_ps(high, factor);
      Table table;
      if (kDtype == QLF_FLOAT32) {
        const __m256i by_plane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                                  0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m256i pa = _mm256_shuffle_epi8(_mm256_castps_si256(a), by_plane);
        const __m256i pb = _mm256_shuffle_epi8(_mm256_castps_si256(b), by_plane);
        const __m256i first = _mm256_unpacklo_epi32(pa, pb), second = _mm256_unpackhi_epi32(pa, pb);
        table.planes[0] = _mm256_permute4x64_epi64(first, 0x88);
        table.planes[1] = _mm256_permute4x64_epi64(first, 0xdd);
        table.planes[2] = _mm256_permute4x64_epi64(second, 0x88);
        table.planes[3] = _mm256_permute4x64_epi64(second, 0xdd);
        table.spread = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                        2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
      } else {
        const __m256i by_plane = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                                  0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        const __m256i split = _mm256_shuffle_epi8(narrow_table<kDtype>(a, b), by_plane);
        table.planes[0] = _mm256_permute4x64_epi64(split, 0x88);
        table.planes[1] = _mm256_permute4x64_epi64(split, 0xdd);
        table.planes[2] = table.planes[3] = _mm256_setzero_si256();
        table.spread = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11,  //
                                        4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15);
      }
      return table;
    }
  };

  static QLF_INLINE void fence() { _mm_sfence(); }
};

}  // namespace

const Kernels avx2_kernels = {encode<Avx2>, decode<Avx2>};

}  // namespace qlf

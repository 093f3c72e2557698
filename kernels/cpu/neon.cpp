// NEON (AArch64) kernels: 4 float32 lanes, table look-ups by bytes.
//
// With QLF_SIMDE the same source is compiled against SIMDe's portable emulation, so that x86 machines test it too.
#ifdef QLF_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
#else
#include <arm_neon.h>
#endif

#include "blocks.h"

namespace qlf {
namespace {

struct Neon {
  // The bits of 4 elements, widened exactly.
  template <int kDtype>
  static inline float32x4_t load4(const uint8_t* src) {
    if (kDtype == QLF_FLOAT32) return vreinterpretq_f32_u8(vld1q_u8(src));
    const uint16x4_t bits = vreinterpret_u16_u8(vld1_u8(src));
    if (kDtype == QLF_FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16));
  }

  template <int kDtype>
  static uint32_t max_bits(const uint8_t* src, size_t count) {
    const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
    uint8x16_t largest = vdupq_n_u8(0);
    for (size_t at = 0; at < count * size; at += 16) {
      const uint8x16_t bits = vld1q_u8(src + at);
      if (kDtype == QLF_FLOAT32) {
        const uint32x4_t magnitude = vandq_u32(vreinterpretq_u32_u8(bits), vdupq_n_u32(0x7fffffffu));
        largest = vreinterpretq_u8_u32(vmaxq_u32(vreinterpretq_u32_u8(largest), magnitude));
      } else {
        const uint16x8_t magnitude = vandq_u16(vreinterpretq_u16_u8(bits), vdupq_n_u16(0x7fff));
        largest = vreinterpretq_u8_u16(vmaxq_u16(vreinterpretq_u16_u8(largest), magnitude));
      }
    }
    return kDtype == QLF_FLOAT32 ? vmaxvq_u32(vreinterpretq_u32_u8(largest))
                                 : vmaxvq_u16(vreinterpretq_u16_u8(largest));
  }

  struct Sums {
    float32x4_t sums[3][4];

    Sums() {
      for (auto& row : sums) {
        for (auto& lanes : row) lanes = vdupq_n_f32(0.0f);
      }
    }

    inline void add(size_t quad, float32x4_t x, float32x4_t c) {
      sums[0][quad] = vaddq_f32(sums[0][quad], vmulq_f32(x, x));
      sums[1][quad] = vaddq_f32(sums[1][quad], vmulq_f32(x, c));
      sums[2][quad] = vaddq_f32(sums[2][quad], vmulq_f32(c, c));
    }

    inline void store(uint8_t* out) const {
      for (size_t k = 0; k < 3; ++k) {
        const float32x4_t low = vaddq_f32(sums[k][0], sums[k][2]), high = vaddq_f32(sums[k][1], sums[k][3]);
        const float32x4_t four = vaddq_f32(low, high);
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        store_f32(out + k * 4, vget_lane_f32(two, 0) + vget_lane_f32(two, 1));
      }
    }
  };

  // Four rounds of binary search, held as minus the rank because a true comparison is -1.
  struct Encoder {
    float32x4_t quarter[3];   // thresholds 3, 7, 11
    uint8x16_t eighths;       // thresholds 1, 5, 9, 13
    uint8x16x2_t sixteenths;  // thresholds 0, 2, ..., 14
    uint8x16x4_t values;      // by rank
    uint8x16_t codes;         // by rank

    explicit Encoder(const Codebook4& book) {
      unsigned eighth[4], sixteenth[8], value[16];
      for (size_t i = 0; i < 3; ++i) quarter[i] = vdupq_n_f32(float_of(book.thresholds[4 * i + 3]));
      for (size_t r = 0; r < 4; ++r) eighth[r] = book.thresholds[4 * r + 1];
      for (size_t r = 0; r < 8; ++r) sixteenth[r] = book.thresholds[2 * r];
      for (size_t r = 0; r < 16; ++r) value[r] = book.values[book.order[r]];
      eighths = bytes_of(eighth);
      for (size_t k = 0; k < 2; ++k) sixteenths.val[k] = bytes_of(sixteenth + 4 * k);
      for (size_t k = 0; k < 4; ++k) values.val[k] = bytes_of(value + 4 * k);
      codes = vld1q_u8(book.order);
    }

    static inline uint8x16_t bytes_of(const unsigned* words) {
      return vld1q_u8(reinterpret_cast<const uint8_t*>(words));
    }

    // Byte numbers of the float32 at place r of a table, from minus r.
    static inline uint8x16_t places(uint32x4_t minus_rank) {
      return vreinterpretq_u8_u32(vmlsq_u32(vdupq_n_u32(0x03020100u), minus_rank, vdupq_n_u32(0x04040404u)));
    }

    inline uint32x4_t minus_rank_of(float32x4_t value) const {
      uint32x4_t rank = vaddq_u32(vcgtq_f32(value, quarter[0]), vcgtq_f32(value, quarter[1]));
      rank = vaddq_u32(rank, vcgtq_f32(value, quarter[2]));
      const float32x4_t third = vreinterpretq_f32_u8(vqtbl1q_u8(eighths, places(rank)));
      rank = vaddq_u32(vaddq_u32(rank, rank), vcgtq_f32(value, third));
      const float32x4_t fourth = vreinterpretq_f32_u8(vqtbl2q_u8(sixteenths, places(rank)));
      return vaddq_u32(vaddq_u32(rank, rank), vcgtq_f32(value, fourth));
    }

    template <int kDtype, bool kMoments>
    inline uint8x16_t codes16(const uint8_t* src, float32x4_t factor, Sums& sums) const {
      const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
      uint32x4_t rank[4];
      for (size_t quad = 0; quad < 4; ++quad) {
        const float32x4_t x = load4<kDtype>(src + quad * 4 * size);
        rank[quad] = minus_rank_of(vmulq_f32(x, factor));
        if (kMoments) sums.add(quad, x, vreinterpretq_f32_u8(vqtbl4q_u8(values, places(rank[quad]))));
      }
      const uint16x8_t low = vcombine_u16(vmovn_u32(rank[0]), vmovn_u32(rank[1]));
      const uint16x8_t high = vcombine_u16(vmovn_u32(rank[2]), vmovn_u32(rank[3]));
      const uint8x16_t minus = vcombine_u8(vmovn_u16(low), vmovn_u16(high));
      return vqtbl1q_u8(codes, vsubq_u8(vdupq_n_u8(0), minus));
    }

    template <int kDtype, bool kMoments>
    inline void encode_block(const uint8_t* src, size_t count, float reciprocal, uint8_t* packed,
                             uint8_t* moments) const {
      const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
      Sums sums;
      for (size_t at = 0; at < count; at += kStep) {
        encode<kDtype, kMoments>(src + at * size, reciprocal, packed + at / 2, sums);
      }
      if (kMoments) sums.store(moments);
    }

    template <int kDtype, bool kMoments>
    inline void encode(const uint8_t* src, float reciprocal, uint8_t* packed, Sums& sums) const {
      const size_t half = kDtype == QLF_FLOAT32 ? 64 : 32;
      const float32x4_t factor = vdupq_n_f32(reciprocal);
      const uint8x16_t a = codes16<kDtype, kMoments>(src, factor, sums);
      const uint8x16_t b = codes16<kDtype, kMoments>(src + half, factor, sums);
      vst1q_u8(packed, vorrq_u8(vshlq_n_u8(vuzp1q_u8(a, b), 4), vuzp2q_u8(a, b)));
    }
  };

  // One 16-byte table per byte of the output element; a block's 16 results are looked up, not computed.
  template <int kDtype>
  struct Decoder {
    static constexpr size_t kSize = kDtype == QLF_FLOAT32 ? 4 : 2;

    struct Table {
      uint8x16_t planes[kSize];

      template <bool kStream>
      inline void decode(const uint8_t* packed, uint8_t* out) const {
        const uint8x16_t bytes = vld1q_u8(packed);
        const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
        put(vzip1q_u8(even, odd), out);
        put(vzip2q_u8(even, odd), out + 16 * kSize);
      }

      inline void put(uint8x16_t code, uint8_t* out) const {
        if (kDtype == QLF_FLOAT32) {
          uint8x16x4_t element;
          for (size_t k = 0; k < 4; ++k) element.val[k] = vqtbl1q_u8(planes[k % kSize], code);
          vst4q_u8(out, element);
        } else {
          uint8x16x2_t element;
          for (size_t k = 0; k < 2; ++k) element.val[k] = vqtbl1q_u8(planes[k], code);
          vst2q_u8(out, element);
        }
      }
    };

    const Codebook4& codebook;
    explicit Decoder(const Codebook4& book) : codebook(book) {}

    inline Table scale(float absmax) const {
      uint8_t elements[16 * kSize];
      Table table;
      for (size_t code = 0; code < 16; ++code) {
        store_element<kDtype>(elements + code * kSize, float_of(codebook.values[code]) * absmax);
      }
      if (kDtype == QLF_FLOAT32) {
        const uint8x16x4_t split = vld4q_u8(elements);
        for (size_t k = 0; k < kSize; ++k) table.planes[k] = split.val[k];
      } else {
        const uint8x16x2_t split = vld2q_u8(elements);
        for (size_t k = 0; k < kSize; ++k) table.planes[k] = split.val[k % 2];
      }
      return table;
    }
  };

  static inline void fence() {}
};

}  // namespace

const Kernels neon_kernels = {encode<Neon>, decode<Neon>};

}  // namespace qlf

// Portable kernels, and the ragged tail for every instruction set.
#include "blocks.h"

namespace qlf {
namespace {

constexpr size_t kLanes = 16;

struct Scalar {
  struct Sums {
    float lanes[3][kLanes] = {};

    inline void add(size_t lane, float x, float c) {
      const float terms[3] = {x * x, x * c, c * c};
      for (size_t k = 0; k < 3; ++k) lanes[k][lane] += terms[k];
    }

    void store(uint8_t* out) {
      for (size_t k = 0; k < 3; ++k) {
        for (size_t half = kLanes / 2; half; half /= 2) {
          for (size_t lane = 0; lane < half; ++lane) lanes[k][lane] += lanes[k][lane + half];
        }
        store_f32(out + k * 4, lanes[k][0]);
      }
    }
  };

  template <int kDtype>
  static uint32_t max_bits(const uint8_t* src, size_t count) {
    const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
    uint32_t largest = 0;
    for (size_t i = 0; i < count; ++i) {
      const uint32_t bits = magnitude_bits<kDtype>(src + i * size);
      largest = bits > largest ? bits : largest;
    }
    return largest;
  }

  struct Encoder {
    const Codebook4& codebook;
    explicit Encoder(const Codebook4& book) : codebook(book) {}

    template <int kDtype, bool kMoments>
    void encode_block(const uint8_t* src, size_t count, float reciprocal, uint8_t* packed, uint8_t* moments) const {
      const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
      Sums sums;
      for (size_t at = 0; at < count; at += kStep) {
        encode<kDtype, kMoments>(src + at * size, reciprocal, packed + at / 2, sums);
      }
      if (kMoments) sums.store(moments);
    }

    // Rank = thresholds below the scaled value. Clamping to [-1, 1] first would not change it: all lie inside.
    template <int kDtype, bool kMoments>
    void encode(const uint8_t* src, float reciprocal, uint8_t* packed, Sums& sums) const {
      const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
      float scaled[kStep];
      int32_t rank[kStep] = {};
      for (size_t i = 0; i < kStep; ++i) scaled[i] = load_element<kDtype>(src + i * size) * reciprocal;
      for (size_t t = 0; t < 15; ++t) {
        const float threshold = float_of(codebook.thresholds[t]);
        for (size_t i = 0; i < kStep; ++i) rank[i] += scaled[i] > threshold;
      }
      for (size_t i = 0; i < kStep; i += 2) {
        packed[i / 2] = static_cast<uint8_t>(codebook.order[rank[i]] << 4 | codebook.order[rank[i + 1]]);
      }
      if (!kMoments) return;
      for (size_t i = 0; i < kStep; ++i) {
        const float value = float_of(codebook.values[codebook.order[rank[i]]]);
        sums.add(i % kLanes, load_element<kDtype>(src + i * size), value);
      }
    }
  };

  template <int kDtype>
  struct Decoder {
    struct Table {
      uint8_t elements[16 * 4];

      template <bool kStream>
      inline void decode(const uint8_t* packed, uint8_t* out) const {
        const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
        for (size_t i = 0; i < kStep / 2; ++i) {
          memcpy(out + 2 * i * size, elements + (packed[i] >> 4) * size, size);
          memcpy(out + (2 * i + 1) * size, elements + (packed[i] & 15) * size, size);
        }
      }
    };

    const Codebook4& codebook;
    explicit Decoder(const Codebook4& book) : codebook(book) {}

    Table scale(float absmax) const {
      Table table;
      const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
      for (size_t code = 0; code < 16; ++code) {
        store_element<kDtype>(table.elements + code * size, float_of(codebook.values[code]) * absmax);
      }
      return table;
    }
  };

  static void fence() {}
};

template <int kDtype>
bool encode_tail_dtype(const EncodeJob& job, size_t count) {
  const Codebook4& book = *job.codebook;
  const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
  const uint32_t bits = Scalar::max_bits<kDtype>(job.src, count);
  if (bits >= kInfinityBits<kDtype>) return false;
  const float largest = widen<kDtype>(bits);
  const float divisor = largest > kSmallestDivisor ? largest : kSmallestDivisor;
  store_f32(job.absmax, divisor);

  Scalar::Sums sums;
  for (size_t i = 0; i < count; ++i) {
    const float x = load_element<kDtype>(job.src + i * size);
    const float scaled = x / divisor;
    size_t rank = 0;
    for (size_t t = 0; t < 15; ++t) rank += scaled > float_of(book.thresholds[t]);
    const unsigned code = book.order[rank];
    if (i % 2 == 0) {
      job.packed[i / 2] = static_cast<uint8_t>(code << 4 | book.zero_code);
    } else {
      job.packed[i / 2] = static_cast<uint8_t>((job.packed[i / 2] & 0xf0u) | code);
    }
    sums.add(i % kLanes, x, float_of(book.values[code]));
  }
  if (job.moments) sums.store(job.moments);
  return true;
}

template <int kDtype>
void decode_tail_dtype(const DecodeJob& job, size_t count) {
  const float absmax = block_scale(job, 0);
  for (size_t i = 0; i < count; ++i) {
    const unsigned code = i % 2 ? job.packed[i / 2] & 15u : job.packed[i / 2] >> 4;
    store_element<kDtype>(job.out + i * size_of(kDtype), float_of(job.codebook->values[code]) * absmax);
  }
}

}  // namespace

const Kernels scalar_kernels = {encode<Scalar>, decode<Scalar>};

bool encode_tail(const EncodeJob& job, size_t count) {
  switch (job.dtype) {
    case QLF_FLOAT32:
      return encode_tail_dtype<QLF_FLOAT32>(job, count);
    case QLF_FLOAT16:
      return encode_tail_dtype<QLF_FLOAT16>(job, count);
    default:
      return encode_tail_dtype<QLF_BFLOAT16>(job, count);
  }
}

void decode_tail(const DecodeJob& job, size_t count) {
  switch (job.dtype) {
    case QLF_FLOAT32:
      return decode_tail_dtype<QLF_FLOAT32>(job, count);
    case QLF_FLOAT16:
      return decode_tail_dtype<QLF_FLOAT16>(job, count);
    default:
      return decode_tail_dtype<QLF_BFLOAT16>(job, count);
  }
}

}  // namespace qlf

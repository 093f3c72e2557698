// Double quantization: the absmax values themselves in 8 bits (spec, "Double quantization"), and the error figures.
#include <float.h>

#include <cmath>

#include "kernels.h"
#include "numeric.h"
#include "parallel.h"
#include "qlf/qlf.h"

namespace qlf {
namespace {

constexpr uint64_t kMaxBlocks = uint64_t{1} << 43;  // 2^48 elements in blocks of 32
constexpr size_t kNestedPerPiece = 64;

const uint8_t* bytes(const void* p) {
  return static_cast<const uint8_t*>(p);
}
uint8_t* bytes(void* p) {
  return static_cast<uint8_t*>(p);
}

// Rank in the 255 thresholds: a look-up by sign, exponent and six bits of mantissa, then one comparison. No cell holds
// two different thresholds (a cell spans at most 1.6 %; the tests compare with a plain search at every threshold), but
// eight of them are one value beside zero, so a cell's ranks may differ by more than one.
class Rank8 {
 public:
  Rank8() {
    for (int32_t cell = 0; cell < kCells; ++cell) {
      const uint32_t smallest = cell ? static_cast<uint32_t>(cell + kLowest) << kDropped : 0;
      const uint32_t next = static_cast<uint32_t>(cell + 1 + kLowest) << kDropped;
      const uint32_t largest = cell + 1 < kCells ? next - 1 : 0x7f800000u;
      set(cell, float_of(smallest), float_of(largest));
      set(kCells + cell, -float_of(largest), -float_of(smallest));
    }
  }

  // q[i] = rank of values[i], for at most 256 values. In two loops: the compiler vectorizes the first.
  inline void of(const float* values, size_t count, uint8_t* q) const {
    int32_t cells[kNestedBlocksize];
    for (size_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(values[i]);
      const int32_t above = static_cast<int32_t>((bits & 0x7fffffffu) >> kDropped) - kLowest;
      const int32_t cell = above < 0 ? 0 : above < kCells ? above : kCells - 1;
      cells[i] = cell + (bits >> 31 ? kCells : 0);
    }
    for (size_t i = 0; i < count; ++i) {
      const Cell& cell = cells_[cells[i]];
      q[i] = cell.ranks[values[i] > cell.threshold];  // indexed, because a branch would be mispredicted
    }
  }

 private:
  struct Cell {
    float threshold;
    uint8_t ranks[2];  // of values up to the threshold, and above it
  };

  static constexpr uint32_t kDropped = 17;
  static constexpr int32_t kLowest = (127 - 26) << 6;  // 2^-26: the smallest threshold is above 2^-25
  static constexpr int32_t kCells = (26 << 6) + 1;     // the last cell begins at 1.0

  void set(int32_t index, float low, float high) {
    Cell& cell = cells_[index];
    cell.ranks[0] = search(low);
    cell.ranks[1] = search(high);
    cell.threshold = cell.ranks[0] < 255 ? float_of(qlf_dynamic8_thresholds[cell.ranks[0]]) : FLT_MAX;
  }

  static uint8_t search(float value) {
    size_t rank = 0;
    while (rank < 255 && value > float_of(qlf_dynamic8_thresholds[rank])) ++rank;
    return static_cast<uint8_t>(rank);
  }

  Cell cells_[2 * kCells];  // of positive values, then of negative ones
};

// Sums of 256 in index order, those summed in index order, in float64. Four sums run side by side to hide the latency
// of an addition; each keeps its own order.
double sum_absmax(const uint8_t* absmax, uint64_t nb) {
  double total = 0.0;
  uint64_t at = 0;
  for (; at + 4 * kNestedBlocksize <= nb; at += 4 * kNestedBlocksize) {
    double part[4] = {};
    for (size_t i = 0; i < kNestedBlocksize; ++i) {
      for (size_t k = 0; k < 4; ++k) part[k] += load_f32(absmax + (at + k * kNestedBlocksize + i) * 4);
    }
    for (size_t k = 0; k < 4; ++k) total += part[k];
  }
  for (; at < nb; at += kNestedBlocksize) {
    const uint64_t end = nb - at < kNestedBlocksize ? nb : at + kNestedBlocksize;
    double part = 0.0;
    for (uint64_t i = at; i < end; ++i) part += load_f32(absmax + i * 4);
    total += part;
  }
  return total;
}

uint64_t first_not_finite(const uint8_t* absmax, uint64_t nb) {
  uint64_t i = 0;
  while (i < nb && (load_u32(absmax + i * 4) & 0x7fffffffu) < 0x7f800000u) ++i;
  return i;
}

void encode_nested_block(const Rank8& ranks, const uint8_t* absmax, size_t count, float offset, uint8_t* q,
                         uint8_t* nested_absmax) {
  float residual[kNestedBlocksize];
  int32_t largest_bits = 0;  // bits of |x| order like |x|
  for (size_t i = 0; i < count; ++i) {
    residual[i] = load_f32(absmax + i * 4) - offset;
    const int32_t magnitude = static_cast<int32_t>(bits_of(residual[i]) & 0x7fffffffu);
    largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
  }
  const float largest = float_of(static_cast<uint32_t>(largest_bits));
  store_f32(nested_absmax, largest);
  if (largest == 0.0f) {
    memset(q, 0, count);
    return;
  }
  const float reciprocal = 1.0f / (largest > kSmallestDivisor ? largest : kSmallestDivisor);
  for (size_t i = 0; i < count; ++i) residual[i] *= reciprocal;
  ranks.of(residual, count, q);
}

}  // namespace
}  // namespace qlf

using namespace qlf;

extern "C" {

int32_t qlf_double_quantize(const void* absmax, uint64_t nb, void* q, void* nested_absmax, void* nested_offset,
                            uint64_t* bad_block, int32_t threads) {
  if (!absmax || !q || !nested_absmax || !nested_offset || !bad_block) return QLF_BAD_ARGUMENT;
  if (nb == 0 || nb > kMaxBlocks || threads < 1 || threads > kMaxThreads) return QLF_BAD_ARGUMENT;
  const FpEnvironment environment;
  const double sum = sum_absmax(bytes(absmax), nb);
  if (!std::isfinite(sum)) {  // finite float32 values cannot overflow it
    *bad_block = first_not_finite(bytes(absmax), nb);
    return QLF_NOT_FINITE;
  }
  const float offset = static_cast<float>(sum / static_cast<double>(nb));
  store_f32(bytes(nested_offset), offset);

  static const Rank8 ranks;
  const size_t nested = static_cast<size_t>((nb + kNestedBlocksize - 1) / kNestedBlocksize);
  for_each_piece((nested + kNestedPerPiece - 1) / kNestedPerPiece, threads, [&](size_t piece) {
    for (size_t j = piece * kNestedPerPiece; j < (piece + 1) * kNestedPerPiece && j < nested; ++j) {
      const size_t first = j * kNestedBlocksize;
      const size_t count = nb - first < kNestedBlocksize ? static_cast<size_t>(nb - first) : kNestedBlocksize;
      encode_nested_block(ranks, bytes(absmax) + first * 4, count, offset, bytes(q) + first,
                          bytes(nested_absmax) + j * 4);
    }
  });
  return QLF_OK;
}

int32_t qlf_double_dequantize(const void* q, const void* nested_absmax, const void* nested_offset, uint64_t nb,
                              void* absmax) {
  if (nb > kMaxBlocks || !nested_offset || (nb && (!q || !nested_absmax || !absmax))) return QLF_BAD_ARGUMENT;
  const FpEnvironment environment;
  const float offset = load_f32(bytes(nested_offset));
  for (uint64_t i = 0; i < nb; ++i) {
    const float nested = load_f32(bytes(nested_absmax) + i / kNestedBlocksize * 4);
    const float scaled = float_of(qlf_dynamic8_values[bytes(q)[i]]) * nested;
    store_f32(bytes(absmax) + i * 4, scaled + offset);
  }
  return QLF_OK;
}

int32_t qlf_squared_error(const void* absmax, const void* moments, uint64_t nb, double* squared_error, double* signal) {
  if (nb > kMaxBlocks || !squared_error || !signal || (nb && (!absmax || !moments))) return QLF_BAD_ARGUMENT;
  const FpEnvironment environment;
  double error = *squared_error, total = *signal;
  for (uint64_t i = 0; i < nb; ++i) {
    const uint8_t* moment = bytes(moments) + i * 12;
    const double scale = load_f32(bytes(absmax) + i * 4);
    const double xx = load_f32(moment), xc = load_f32(moment + 4), cc = load_f32(moment + 8);
    error += xx - 2.0 * scale * xc + scale * scale * cc;
    total += xx;
  }
  *squared_error = error;
  *signal = total;
  return QLF_OK;
}

}  // extern "C"

// Both levels of dequantization in one launch (spec, "Decoding a weight"). The work is bound by memory: 0.516 bytes
// read and 2 written an element for bfloat16, about 24 instruction slots an element on an H100, of which this takes 5
// to 6.
//
// A thread block walks over tiles of 8192 elements. A tile's codes come in by one 16-byte load a thread and go through
// shared memory, because the thread that loads 32 codes must not write their 32 elements: neighbouring threads write
// neighbouring 16 bytes, so that every store of a warp is 512 contiguous bytes. The scale of each block is decoded
// once, by one thread. The loads of the next tile are issued before this one is decoded, and the buffers alternate, so
// that one barrier a tile is enough.
//
// Lookups: the 16 entries of the 4-bit table lie in 16 different banks of shared memory, so that a warp reads any 16 of
// them without a conflict. That is as fast as a shuffle and needs no table in registers.
#include "device.cuh"

namespace qlf {

constexpr u32 kTile = 8192;              // elements; 32 codes for each thread
constexpr u32 kTileBytes = kTile / 2;    // of packed codes
constexpr u32 kTileScales = kTile / 32;  // at the smallest blocksize: one a thread
static_assert(kTileBytes == 16 * kThreads, "one 16-byte load a thread");
static_assert(kTileScales == kThreads, "one scale a thread");

struct Weight {
  const u8* packed;               // [ceil(n/2)]
  const void* absmax;             // float [nb], or 8-bit codes [nb]
  const float* nested_absmax;     // [ceil(nb/256)], or null without double quantization
  const float* nested_quant_map;  // [256], or null for the specified table
  float nested_offset;
  u64 n;
  u32 log2_blocksize;
};

// What a thread has loaded ahead for its part of a tile.
struct Ahead {
  uint4 codes;
  u32 absmax;    // bits of the float, or the 8-bit code
  float nested;  // nested_absmax of its block
};

__device__ __forceinline__ uint4 load_codes(const u8* packed, u64 first, u64 bytes, bool aligned) {
  if (aligned && first + 16 <= bytes) return __ldg(reinterpret_cast<const uint4*>(packed + first));
  u32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (u32 w = 0; w < 4; ++w) {
#pragma unroll 1
    for (u32 i = w * 4; i < w * 4 + 4; ++i) {
      if (first + i < bytes) words[w] |= static_cast<u32>(packed[first + i]) << (i % 4 * 8);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool kNested>
__device__ __forceinline__ Ahead load_ahead(const Weight& weight, u64 tile, bool aligned) {
  Ahead ahead;
  ahead.codes = load_codes(weight.packed, tile * kTileBytes + threadIdx.x * 16, (weight.n + 1) / 2, aligned);
  ahead.absmax = 0;
  ahead.nested = 0.0f;
  const u64 first = tile * kTile + (static_cast<u64>(threadIdx.x) << weight.log2_blocksize);
  if (threadIdx.x < kTile >> weight.log2_blocksize && first < weight.n) {
    const u64 block = first >> weight.log2_blocksize;
    if (kNested) {
      ahead.absmax = __ldg(static_cast<const u8*>(weight.absmax) + block);
      ahead.nested = __ldg(weight.nested_absmax + (block >> kNestedShift));
    } else {
      ahead.absmax = __ldg(static_cast<const u32*>(weight.absmax) + block);
    }
  }
  return ahead;
}

// Eight codes (four, for 4-byte elements) in memory order: the high nibble of a byte comes first.
template <typename Format>
__device__ __forceinline__ uint4 decode(u32 word, const float* table, float scale) {
  u32 out[4];
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    if constexpr (sizeof(typename Format::Bits) == 4) {
      const u32 code = word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15;
      out[i] = __float_as_uint(__fmul_rn(table[code], scale));
    } else {
      const u32 codes = word >> (i * 8);
      out[i] = Format::pair(__fmul_rn(table[codes >> 4 & 15], scale), __fmul_rn(table[codes & 15], scale));
    }
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// `count` elements of the 16 bytes `values`, one by one: the end of the tensor, or an unaligned output.
template <typename Bits>
__device__ __forceinline__ void store_part(Bits* out, uint4 values, u64 count) {
  const u32 words[4] = {values.x, values.y, values.z, values.w};
  constexpr u32 kEach = 4 / sizeof(Bits);
#pragma unroll
  for (u32 i = 0; i < 4 * kEach; ++i) {
    if (i < count) out[i] = static_cast<Bits>(words[i / kEach] >> (i % kEach * 16));
  }
}

template <typename Format, bool kNested>
__device__ void dequantize(const Weight& weight, u32 quant_type, typename Format::Bits* out) {
  typedef typename Format::Bits Bits;
  constexpr u32 kEach = 16 / sizeof(Bits);  // elements in 16 bytes
  constexpr u32 kSteps = kTile / (kThreads * kEach);
  __shared__ float table[16];
  __shared__ float table8[kNested ? 256 : 1];
  __shared__ __align__(16) u32 codes[2][kTileBytes / 4];
  __shared__ float scales[2][kTileScales];

  const u32 thread = threadIdx.x;
  if (thread < 16) table[thread] = __uint_as_float((quant_type == kFp4 ? qlf_fp4_values : qlf_nf4_values)[thread]);
  if (kNested) {
    table8[thread] =
        weight.nested_quant_map ? weight.nested_quant_map[thread] : __uint_as_float(qlf_dynamic8_values[thread]);
    __syncthreads();
  }

  const u64 tiles = (weight.n + kTile - 1) / kTile;
  const bool aligned_in = is_vector_aligned(weight.packed), aligned_out = is_vector_aligned(out);
  const auto values_of = [&](u32 buffer, u32 piece) {
    const u32 word = kEach == 8 ? codes[buffer][piece] : codes[buffer][piece / 2] >> (piece % 2 * 16);
    return decode<Format>(word, table, scales[buffer][piece * kEach >> weight.log2_blocksize]);
  };
  u32 buffer = 0;
  Ahead ahead;
  if (blockIdx.x < tiles) ahead = load_ahead<kNested>(weight, blockIdx.x, aligned_in);
  for (u64 tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
    *reinterpret_cast<uint4*>(&codes[buffer][thread * 4]) = ahead.codes;
    scales[buffer][thread] = kNested ? __fadd_rn(__fmul_rn(table8[ahead.absmax], ahead.nested), weight.nested_offset)
                                     : __uint_as_float(ahead.absmax);
    __syncthreads();  // also: nobody still reads the buffer that the next tile will fill
    if (tile + gridDim.x < tiles) ahead = load_ahead<kNested>(weight, tile + gridDim.x, aligned_in);
    if (aligned_out && (tile + 1) * kTile <= weight.n) {
#pragma unroll
      for (u32 step = 0; step < kSteps; ++step) {
        const u32 piece = step * kThreads + thread;
        *reinterpret_cast<uint4*>(out + tile * kTile + piece * kEach) = values_of(buffer, piece);
      }
    } else {
#pragma unroll 1  // the last tile: short code rather than fast code
      for (u32 step = 0; step < kSteps; ++step) {
        const u32 piece = step * kThreads + thread;
        const u64 first = tile * kTile + piece * kEach;
        if (first < weight.n) store_part(out + first, values_of(buffer, piece), weight.n - first);
      }
    }
  }
}

}  // namespace qlf

// Launch with 256 threads and any grid. Integers are 64 bits wide, so that the host need not know their types.
// quant_type: 0 nf4, 1 fp4. nested_quant_map may be null. Kernels not called nested read none of the nested arguments.
#define QLF_DEQUANTIZE(name, Format, nested)                                                                        \
  extern "C" __global__ void __launch_bounds__(qlf::kThreads)                                                       \
      name(const qlf::u8* packed, const void* absmax, const float* nested_absmax, const float* nested_quant_map,    \
           float nested_offset, qlf::u64 n, qlf::u64 log2_blocksize, qlf::u64 quant_type, qlf::Format::Bits* out) { \
    const qlf::Weight weight = {                                                                                    \
        packed, absmax, nested_absmax, nested_quant_map, nested_offset, n, static_cast<qlf::u32>(log2_blocksize)};  \
    qlf::dequantize<qlf::Format, nested>(weight, static_cast<qlf::u32>(quant_type), out);                           \
  }

QLF_DEQUANTIZE(qlf_dequantize_bfloat16, BFloat16, false)
QLF_DEQUANTIZE(qlf_dequantize_float16, Float16, false)
QLF_DEQUANTIZE(qlf_dequantize_float32, Float32, false)
QLF_DEQUANTIZE(qlf_dequantize_nested_bfloat16, BFloat16, true)
QLF_DEQUANTIZE(qlf_dequantize_nested_float16, Float16, true)
QLF_DEQUANTIZE(qlf_dequantize_nested_float32, Float32, true)

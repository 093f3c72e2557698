// Encoding (spec, "Encoding a weight" and "Double quantization").
//
// qlf_quantize_*: a thread block walks over tiles of 4096 elements, the largest block; a tile starts at a block. A
// thread holds two runs of eight elements in registers, neighbouring threads neighbouring runs. The largest magnitude
// of a block is an integer maximum over the bits of |x|: exact in any order, and NaN and infinity come out on top.
//
// Double quantization takes three launches, for its mean is specified in two levels: float64 sums of 256 in index
// order, one thread for each; those sums in index order, by one thread; then the codes.
#include "device.cuh"

namespace qlf {

constexpr u32 kRun = 8;  // elements that a thread encodes into four bytes
constexpr u32 kRuns = 2;
constexpr u32 kQuantizeTile = kThreads * kRun * kRuns;
constexpr u32 kWarpElements = 32 * kRun;
constexpr u32 kWarps = kThreads / 32;
static_assert(kQuantizeTile == 4096, "the largest blocksize");

// How many of the `2 * kHalf - 1` ascending thresholds lie below the value: a tie takes the lower code. Clamping the
// value to [-1, 1] first, as the spec does, changes nothing here, for all thresholds lie inside.
template <u32 kHalf>
__device__ __forceinline__ u32 rank_of(float value, const float* thresholds) {
  u32 rank = 0;
#pragma unroll
  for (u32 step = kHalf; step; step /= 2) {
    if (value > thresholds[rank + step - 1]) rank += step;
  }
  return rank;
}

// Bits of the largest magnitude among `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ u32 largest_of_lanes(u32 bits, u32 lanes) {
  for (u32 apart = 1; apart < lanes; apart *= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, apart));
  return bits;
}

// Eight elements from `first` on as float32; what lies past n counts as 0, which is also what pads an odd count.
template <typename Format>
__device__ __forceinline__ void load_run(const typename Format::Bits* x, u64 first, u64 n, bool aligned,
                                         float (&values)[kRun]) {
  typedef typename Format::Bits Bits;
  constexpr u32 kVectors = kRun * sizeof(Bits) / 16, kEach = 4 / sizeof(Bits);
  if (aligned && first + kRun <= n) {
#pragma unroll
    for (u32 v = 0; v < kVectors; ++v) {
      const uint4 vector = __ldg(reinterpret_cast<const uint4*>(x + first) + v);
      const u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (u32 i = 0; i < 4 * kEach; ++i) {
        const u32 bits = words[i / kEach] >> (i % kEach * 16);
        values[v * 4 * kEach + i] = Format::value(static_cast<Bits>(bits));
      }
    }
    return;
  }
#pragma unroll
  for (u32 i = 0; i < kRun; ++i) values[i] = first + i < n ? Format::value(x[first + i]) : 0.0f;
}

struct Encoded {
  u8* packed;      // [ceil(n/2)]
  float* absmax;   // [nb]
  u64* bad_block;  // lowered to the first block with a NaN or infinity
};

template <typename Format>
__device__ void quantize(const typename Format::Bits* x, u64 n, u32 log2_blocksize, u32 quant_type, Encoded to) {
  __shared__ float thresholds[16];
  __shared__ u32 order[16];  // one bank an entry
  __shared__ u32 parts[kRuns * kWarps];
  const u32 thread = threadIdx.x, warp = thread / 32;
  const bool fp4 = quant_type == kFp4;
  if (thread < 16) {
    order[thread] = (fp4 ? qlf_fp4_order : qlf_nf4_order)[thread];
    if (thread < 15) thresholds[thread] = __uint_as_float((fp4 ? qlf_fp4_thresholds : qlf_nf4_thresholds)[thread]);
  }
  __syncthreads();

  const float smallest = __uint_as_float(kSmallestDivisorBits);
  const u32 blocksize = 1u << log2_blocksize;
  const u32 lanes = min(blocksize / kRun, 32u);
  const bool aligned = is_vector_aligned(x), aligned_packed = (reinterpret_cast<u64>(to.packed) & 3) == 0;
  const u64 tiles = (n + kQuantizeTile - 1) / kQuantizeTile;
  for (u64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float values[kRuns][kRun];
    u32 largest[kRuns];
#pragma unroll
    for (u32 r = 0; r < kRuns; ++r) {
      load_run<Format>(x, tile * kQuantizeTile + (r * kThreads + thread) * kRun, n, aligned, values[r]);
      u32 bits = 0;
#pragma unroll
      for (u32 i = 0; i < kRun; ++i) bits = max(bits, __float_as_uint(values[r][i]) & kMagnitude);
      largest[r] = largest_of_lanes(bits, lanes);
    }
    if (blocksize > kWarpElements) {  // a block of several warps: the same for all threads, so the barriers are safe
      __syncthreads();                // the parts of the tile before have been read
#pragma unroll
      for (u32 r = 0; r < kRuns; ++r) {
        if (thread % 32 == 0) parts[r * kWarps + warp] = largest[r];
      }
      __syncthreads();
      const u32 together = blocksize / kWarpElements;
#pragma unroll
      for (u32 r = 0; r < kRuns; ++r) {
        const u32 first = (r * kWarps + warp) / together * together;
        for (u32 i = 0; i < together; ++i) largest[r] = max(largest[r], parts[first + i]);
      }
    }
#pragma unroll
    for (u32 r = 0; r < kRuns; ++r) {
      const u64 first = tile * kQuantizeTile + (r * kThreads + thread) * kRun;
      if (first >= n) break;
      const u64 block = first >> log2_blocksize;
      const bool full = ((block + 1) << log2_blocksize) <= n;
      const float above_zero = fmaxf(__uint_as_float(largest[r]), smallest);
      const float reciprocal = __frcp_rn(above_zero);
      if ((first & (blocksize - 1)) == 0) {
        to.absmax[block] = full ? __uint_as_float(largest[r]) : above_zero;
        if (largest[r] >= kInfinity) atomicMin(to.bad_block, block);
      }
      u32 word = 0;
#pragma unroll
      for (u32 i = 0; i < kRun; ++i) {
        const float scaled = full ? __fmul_rn(values[r][i], reciprocal) : __fdiv_rn(values[r][i], above_zero);
        word |= order[rank_of<8>(scaled, thresholds)] << (i / 2 * 8 + (i % 2 ? 0 : 4));
      }
      const u64 at = first / 2, bytes = (n + 1) / 2;
      if (aligned_packed && at + 4 <= bytes) {
        *reinterpret_cast<u32*>(to.packed + at) = word;
      } else {
        for (u32 i = 0; i < 4 && at + i < bytes; ++i) to.packed[at + i] = static_cast<u8>(word >> (i * 8));
      }
    }
  }
}

}  // namespace qlf

// All kernels are launched with 256 threads and any grid, but qlf_absmax_mean, which takes one block.
#define QLF_QUANTIZE(name, Format)                                                                                  \
  extern "C" __global__ void __launch_bounds__(qlf::kThreads)                                                       \
      name(const qlf::Format::Bits* x, qlf::u64 n, qlf::u64 log2_blocksize, qlf::u64 quant_type, qlf::u8* packed,   \
           float* absmax, qlf::u64* bad_block) {                                                                    \
    const qlf::Encoded to = {packed, absmax, bad_block};                                                            \
    qlf::quantize<qlf::Format>(x, n, static_cast<qlf::u32>(log2_blocksize), static_cast<qlf::u32>(quant_type), to); \
  }

QLF_QUANTIZE(qlf_quantize_bfloat16, BFloat16)
QLF_QUANTIZE(qlf_quantize_float16, Float16)
QLF_QUANTIZE(qlf_quantize_float32, Float32)

// sums[j]: float64 sum of the absmax of nested block j, in index order. bad: lowered to the first that is not finite.
extern "C" __global__ void __launch_bounds__(qlf::kThreads)
    qlf_absmax_sums(const float* absmax, qlf::u64 blocks, double* sums, qlf::u64* bad) {
  const qlf::u64 nested = (blocks + 255) / 256;
  for (qlf::u64 j = blockIdx.x * static_cast<qlf::u64>(qlf::kThreads) + threadIdx.x; j < nested;
       j += gridDim.x * static_cast<qlf::u64>(qlf::kThreads)) {
    const qlf::u64 end = min((j + 1) * 256, blocks);
    double sum = 0.0;
    for (qlf::u64 i = j * 256; i < end; ++i) {
      const float value = absmax[i];
      if ((__float_as_uint(value) & qlf::kMagnitude) >= qlf::kInfinity) atomicMin(bad, i);
      sum = __dadd_rn(sum, static_cast<double>(value));
    }
    sums[j] = sum;
  }
}

// The mean: the sums of the nested blocks added in index order, rounded once to float32. One block; its threads fetch,
// the first one adds.
extern "C" __global__ void __launch_bounds__(qlf::kThreads)
    qlf_absmax_mean(const double* sums, qlf::u64 blocks, float* offset) {
  __shared__ double fetched[qlf::kThreads];
  const qlf::u64 nested = (blocks + 255) / 256;
  double sum = 0.0;
  for (qlf::u64 first = 0; first < nested; first += qlf::kThreads) {
    if (first + threadIdx.x < nested) fetched[threadIdx.x] = sums[first + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      const qlf::u64 count = min(nested - first, static_cast<qlf::u64>(qlf::kThreads));
      for (qlf::u64 i = 0; i < count; ++i) sum = __dadd_rn(sum, fetched[i]);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *offset = __double2float_rn(__ddiv_rn(sum, static_cast<double>(blocks)));
}

// The 8-bit codes; a thread block takes nested blocks of 256, one element a thread.
extern "C" __global__ void __launch_bounds__(qlf::kThreads)
    qlf_quantize_absmax(const float* absmax, qlf::u64 blocks, const float* offset, qlf::u8* codes,
                        float* nested_absmax) {
  __shared__ float thresholds[256];
  __shared__ qlf::u32 parts[qlf::kWarps];
  const qlf::u32 thread = threadIdx.x;
  if (thread < 255) thresholds[thread] = __uint_as_float(qlf_dynamic8_thresholds[thread]);
  const float mean = *offset;
  for (qlf::u64 j = blockIdx.x; j < (blocks + 255) / 256; j += gridDim.x) {
    const qlf::u64 i = j * 256 + thread;
    const float residual = i < blocks ? __fsub_rn(absmax[i], mean) : 0.0f;
    qlf::u32 largest = qlf::largest_of_lanes(__float_as_uint(residual) & qlf::kMagnitude, 32);
    if (thread % 32 == 0) parts[thread / 32] = largest;
    __syncthreads();  // also for the thresholds
    for (qlf::u32 w = 0; w < qlf::kWarps; ++w) largest = max(largest, parts[w]);
    const float scale = __uint_as_float(largest);
    if (i < blocks) {
      const float reciprocal = __frcp_rn(fmaxf(scale, __uint_as_float(qlf::kSmallestDivisorBits)));
      const float scaled = __fmul_rn(residual, reciprocal);
      codes[i] = largest ? static_cast<qlf::u8>(qlf::rank_of<128>(scaled, thresholds)) : 0;
    }
    if (thread == 0) nested_absmax[j] = scale;
    __syncthreads();  // before the parts of the next one
  }
}

// The loops over full blocks, written once for every instruction set. An `Isa` brings:
//   max_bits<D>(src, count)      integer maximum of the bits of |x|
//   Encoder(codebook), .encode_block<D, M>(src, count, reciprocal, packed, moments)
//                                with M, the moments too: lane l of 16 adds elements l, l + 16, ... in order
//   Decoder<D>(codebook), .scale(absmax) -> Table, Table.decode<stream>(packed, out) for kStep elements
//   fence()                      orders streaming stores before the call returns
#pragma once

#include "kernels.h"
#include "numeric.h"

namespace qlf {
namespace {

constexpr size_t kStep = 32;
constexpr size_t kMaxBlocksize = 4096;

template <class Isa, int kDtype, bool kMoments>
size_t encode_blocks(const EncodeJob& job) {
  // Reciprocals of a few blocks first: their divisions overlap, and the second pass reads from the L1 cache.
  constexpr size_t kBatchBlocks = 16, kBatchElements = 2048;
  const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
  const size_t fitting = kBatchElements / job.blocksize;
  const size_t batch = fitting < 1 ? 1 : fitting > kBatchBlocks ? kBatchBlocks : fitting;
  const typename Isa::Encoder encoder(*job.codebook);
  float reciprocal[kBatchBlocks];

  for (size_t first = 0; first < job.blocks; first += batch) {
    const size_t count = job.blocks - first < batch ? job.blocks - first : batch;
    for (size_t i = 0; i < count; ++i) {
      const uint8_t* src = job.src + (first + i) * job.blocksize * size;
      const uint32_t bits = Isa::template max_bits<kDtype>(src, job.blocksize);
      if (bits >= kInfinityBits<kDtype>) return first + i;
      const float absmax = widen<kDtype>(bits);
      store_f32(job.absmax + (first + i) * 4, absmax);
      reciprocal[i] = 1.0f / (absmax > kSmallestDivisor ? absmax : kSmallestDivisor);
    }
    for (size_t i = 0; i < count; ++i) {
      const uint8_t* src = job.src + (first + i) * job.blocksize * size;
      uint8_t* packed = job.packed + (first + i) * job.blocksize / 2;
      uint8_t* moments = kMoments ? job.moments + (first + i) * 12 : nullptr;
      encoder.template encode_block<kDtype, kMoments>(src, job.blocksize, reciprocal[i], packed, moments);
    }
  }
  return job.blocks;
}

template <class Isa, int kDtype>
size_t encode_dtype(const EncodeJob& job) {
  return job.moments ? encode_blocks<Isa, kDtype, true>(job) : encode_blocks<Isa, kDtype, false>(job);
}

template <class Isa>
size_t encode(const EncodeJob& job) {
  switch (job.dtype) {
    case QLF_FLOAT32:
      return encode_dtype<Isa, QLF_FLOAT32>(job);
    case QLF_FLOAT16:
      return encode_dtype<Isa, QLF_FLOAT16>(job);
    default:
      return encode_dtype<Isa, QLF_BFLOAT16>(job);
  }
}

// absmax of a block of the job: stored, or decoded from its second level in two roundings.
inline float block_scale(const DecodeJob& job, size_t block) {
  if (job.absmax) return load_f32(job.absmax + block * 4);
  const uint8_t* nested = job.nested_absmax + (job.first_block + block) / kNestedBlocksize * 4;
  const float scaled = float_of(qlf_dynamic8_values[job.q_absmax[block]]) * load_f32(nested);
  return scaled + job.nested_offset;
}

template <class Isa, int kDtype, bool kStream>
void decode_blocks(const DecodeJob& job) {
  const size_t size = kDtype == QLF_FLOAT32 ? 4 : 2;
  const typename Isa::template Decoder<kDtype> decoder(*job.codebook);
  const uint8_t* packed = job.packed;
  uint8_t* out = job.out;
  for (size_t block = 0; block < job.blocks; ++block) {
    const auto table = decoder.scale(block_scale(job, block));
    for (size_t at = 0; at < job.blocksize; at += kStep) {
      table.template decode<kStream>(packed, out);
      packed += kStep / 2;
      out += kStep * size;
    }
  }
  if (kStream) Isa::fence();
}

template <class Isa, int kDtype>
void decode_dtype(const DecodeJob& job) {
  job.stream ? decode_blocks<Isa, kDtype, true>(job) : decode_blocks<Isa, kDtype, false>(job);
}

template <class Isa>
void decode(const DecodeJob& job) {
  switch (job.dtype) {
    case QLF_FLOAT32:
      return decode_dtype<Isa, QLF_FLOAT32>(job);
    case QLF_FLOAT16:
      return decode_dtype<Isa, QLF_FLOAT16>(job);
    default:
      return decode_dtype<Isa, QLF_BFLOAT16>(job);
  }
}

}  // namespace
}  // namespace qlf

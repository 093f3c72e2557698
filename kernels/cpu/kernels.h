// What the dispatcher (api.cpp) and the per-instruction-set files share.
//
// Files of this folder are compiled with different -m flags. So every function in a header here has internal linkage
// (static, or inside an anonymous namespace): the linker must never pick one file's AVX-512 copy of a helper for all.
// For the same reason those files use nothing of the C++ library.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace qlf {

struct Codebook4 {
  const unsigned* values;      // float32 bits, by code
  const unsigned* thresholds;  // 15 float32 bits, ascending
  const unsigned char* order;  // the codes sorted by value
  unsigned zero_code;
};

// Encode `blocks` full blocks. Pointers are bytes: they may have any alignment.
struct EncodeJob {
  const uint8_t* src;
  int32_t dtype;
  const Codebook4* codebook;
  size_t blocksize;
  size_t blocks;
  uint8_t* packed;
  uint8_t* absmax;
  uint8_t* moments;  // may be null
};

// Decode `blocks` full blocks. Scales are either absmax, or (q_absmax, nested_absmax, nested_offset, first_block).
struct DecodeJob {
  const uint8_t* packed;
  const uint8_t* absmax;  // null when double-quantized
  const uint8_t* q_absmax;
  const uint8_t* nested_absmax;
  float nested_offset;
  uint64_t first_block;
  const Codebook4* codebook;
  size_t blocksize;
  size_t blocks;
  int32_t dtype;
  uint8_t* out;
  bool stream;  // bypass the cache; only set when out is 64-byte aligned
};

struct Kernels {
  size_t (*encode)(const EncodeJob&);  // index of the first block with a NaN or infinity, or job.blocks
  void (*decode)(const DecodeJob&);
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels neon_kernels;

// The ragged last block: `count` < blocksize elements, where the encoder divides (scalar on every processor).
bool encode_tail(const EncodeJob& job, size_t count);  // false: a NaN or infinity
void decode_tail(const DecodeJob& job, size_t count);

constexpr size_t kNestedBlocksize = 256;

}  // namespace qlf

// The C interface: checks arguments, picks kernels, splits the work.
#include <atomic>
#include <initializer_list>

#include "kernels.h"
#include "numeric.h"
#include "parallel.h"
#include "qlf/qlf.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qlf {
namespace {

constexpr Codebook4 kCodebooks[2] = {
    {qlf_nf4_values, qlf_nf4_thresholds, qlf_nf4_order, 7},
    {qlf_fp4_values, qlf_fp4_thresholds, qlf_fp4_order, 0},
};

// Elements that one thread takes at a time: a multiple of every blocksize, and some 30 microseconds of work.
constexpr uint64_t kPieceElements = uint64_t{1} << 17;
// Outputs larger than this would only push other data out of the caches.
constexpr uint64_t kStreamBytes = uint64_t{32} << 20;
// Sizes in bytes must stay far from overflowing; spec limit T7.
constexpr uint64_t kMaxElements = uint64_t{1} << 48;

// CPUID traps in a virtual machine (10 microseconds and more), so it is asked once.
bool processor_has(int32_t isa) {
  if (isa == QLF_ISA_SCALAR) return true;
#if defined(QLF_SIMDE)
  return isa == QLF_ISA_AVX512 || isa == QLF_ISA_NEON;
#elif defined(__x86_64__)
  static const bool avx2 = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2");
  }();
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == QLF_ISA_AVX2 ? avx2 : isa == QLF_ISA_AVX512 && avx512;
#elif defined(__aarch64__)
  return isa == QLF_ISA_NEON;
#else
  return false;
#endif
}

const Kernels* compiled_kernels(int32_t isa) {
  switch (isa) {
    case QLF_ISA_SCALAR:
      return &scalar_kernels;
#if defined(__x86_64__) && !defined(QLF_SIMDE)
    case QLF_ISA_AVX2:
      return &avx2_kernels;
#endif
#if defined(__x86_64__) || defined(QLF_SIMDE)
    case QLF_ISA_AVX512:
      return &avx512_kernels;
#endif
#if defined(__aarch64__) || defined(QLF_SIMDE)
    case QLF_ISA_NEON:
      return &neon_kernels;
#endif
    default:
      return nullptr;
  }
}

const Kernels* find_kernels(int32_t isa) {
  if (isa != QLF_ISA_BEST) return processor_has(isa) ? compiled_kernels(isa) : nullptr;
  static const int32_t best = [] {
    for (const int32_t candidate : {int32_t{QLF_ISA_AVX512}, int32_t{QLF_ISA_AVX2}, int32_t{QLF_ISA_NEON}}) {
      if (processor_has(candidate)) return candidate;
    }
    return static_cast<int32_t>(QLF_ISA_SCALAR);
  }();
  return compiled_kernels(best);
}

bool valid_layout(uint64_t n, int32_t quant_type, uint32_t blocksize, int32_t dtype, int32_t threads) {
  return n < kMaxElements && (quant_type == QLF_NF4 || quant_type == QLF_FP4) && blocksize >= 32 && blocksize <= 4096 &&
         (blocksize & (blocksize - 1)) == 0 && dtype >= QLF_FLOAT32 && dtype <= QLF_BFLOAT16 && threads >= 1 &&
         threads <= kMaxThreads;
}

size_t pieces_of(uint64_t n, uint64_t piece) {
  return static_cast<size_t>((n + piece - 1) / piece);
}

const uint8_t* bytes(const void* p) {
  return static_cast<const uint8_t*>(p);
}
uint8_t* bytes(void* p) {
  return static_cast<uint8_t*>(p);
}

void keep_smallest(std::atomic<uint64_t>& smallest, uint64_t candidate) {
  uint64_t seen = smallest.load();
  while (candidate < seen && !smallest.compare_exchange_weak(seen, candidate)) {
  }
}

// Run one piece of a decode whose scales are either kind; pieces start at multiples of kPieceElements.
int32_t run_decode(DecodeJob whole, uint64_t n, int32_t threads, const Kernels& kernels) {
  const size_t element = size_of(whole.dtype);
  whole.stream = n * element >= kStreamBytes && reinterpret_cast<uintptr_t>(whole.out) % 64 == 0;
  for_each_piece(pieces_of(n, kPieceElements), threads, [&](size_t piece) {
    const uint64_t begin = piece * kPieceElements;
    const uint64_t count = n - begin < kPieceElements ? n - begin : kPieceElements;
    const size_t first = static_cast<size_t>(begin / whole.blocksize);
    const auto starting_at = [&](size_t block) {
      DecodeJob job = whole;
      job.packed += block * job.blocksize / 2;
      job.out += block * job.blocksize * element;
      job.first_block += block;
      job.absmax = job.absmax ? job.absmax + block * 4 : nullptr;
      job.q_absmax = job.q_absmax ? job.q_absmax + block : nullptr;
      return job;
    };
    DecodeJob job = starting_at(first);
    job.blocks = static_cast<size_t>(count / whole.blocksize);
    if (job.blocks) kernels.decode(job);
    const size_t tail = static_cast<size_t>(count % whole.blocksize);
    if (tail) decode_tail(starting_at(first + job.blocks), tail);
  });
  return QLF_OK;
}

}  // namespace
}  // namespace qlf

using namespace qlf;

extern "C" {

int32_t qlf_abi_version(void) {
  return QLF_ABI_VERSION;
}

int32_t qlf_isa_supported(int32_t isa) {
  return processor_has(isa) && compiled_kernels(isa) ? 1 : 0;
}

int32_t qlf_quantize(const void* src, int32_t dtype, uint64_t n, int32_t quant_type, uint32_t blocksize, void* packed,
                     void* absmax, void* moments, uint64_t* bad_block, int32_t threads, int32_t isa) {
  if (!valid_layout(n, quant_type, blocksize, dtype, threads) || !bad_block) return QLF_BAD_ARGUMENT;
  if (n && (!src || !packed || !absmax)) return QLF_BAD_ARGUMENT;
  const Kernels* kernels = find_kernels(isa);
  if (!kernels) return QLF_UNSUPPORTED_ISA;

  const EncodeJob whole = {bytes(src), dtype,         &kCodebooks[quant_type], blocksize,
                           0,          bytes(packed), bytes(absmax),           bytes(moments)};
  std::atomic<uint64_t> bad{UINT64_MAX};
  for_each_piece(pieces_of(n, kPieceElements), threads, [&](size_t piece) {
    const uint64_t begin = piece * kPieceElements;
    const uint64_t count = n - begin < kPieceElements ? n - begin : kPieceElements;
    const size_t first = static_cast<size_t>(begin / blocksize);
    if (first > bad.load(std::memory_order_relaxed)) return;
    const auto starting_at = [&](size_t block) {
      EncodeJob job = whole;
      job.src += block * blocksize * size_of(dtype);
      job.packed += block * blocksize / 2;
      job.absmax += block * 4;
      job.moments = job.moments ? job.moments + block * 12 : nullptr;
      return job;
    };
    EncodeJob job = starting_at(first);
    job.blocks = static_cast<size_t>(count / blocksize);
    const size_t done = kernels->encode(job);
    if (done < job.blocks) return keep_smallest(bad, first + done);
    const size_t tail = static_cast<size_t>(count % blocksize);
    if (tail && !encode_tail(starting_at(first + done), tail)) keep_smallest(bad, first + done);
  });
  if (bad.load() == UINT64_MAX) return QLF_OK;
  *bad_block = bad.load();
  return QLF_NOT_FINITE;
}

int32_t qlf_dequantize(const void* packed, const void* absmax, uint64_t n, int32_t quant_type, uint32_t blocksize,
                       int32_t dtype, void* out, int32_t threads, int32_t isa) {
  if (!valid_layout(n, quant_type, blocksize, dtype, threads)) return QLF_BAD_ARGUMENT;
  if (n && (!packed || !absmax || !out)) return QLF_BAD_ARGUMENT;
  const Kernels* kernels = find_kernels(isa);
  if (!kernels) return QLF_UNSUPPORTED_ISA;
  DecodeJob job = {};
  job.packed = bytes(packed);
  job.absmax = bytes(absmax);
  job.codebook = &kCodebooks[quant_type];
  job.blocksize = blocksize;
  job.dtype = dtype;
  job.out = bytes(out);
  return run_decode(job, n, threads, *kernels);
}

int32_t qlf_dequantize_nested(const void* packed, const void* q_absmax, const void* nested_absmax,
                              const void* nested_offset, uint64_t first_block, uint64_t n, int32_t quant_type,
                              uint32_t blocksize, int32_t dtype, void* out, int32_t threads, int32_t isa) {
  if (!valid_layout(n, quant_type, blocksize, dtype, threads) || first_block >= kMaxElements) return QLF_BAD_ARGUMENT;
  if (!nested_offset || (n && (!packed || !q_absmax || !nested_absmax || !out))) return QLF_BAD_ARGUMENT;
  const Kernels* kernels = find_kernels(isa);
  if (!kernels) return QLF_UNSUPPORTED_ISA;
  DecodeJob job = {};
  job.packed = bytes(packed);
  job.q_absmax = bytes(q_absmax);
  job.nested_absmax = bytes(nested_absmax);
  job.nested_offset = load_f32(bytes(nested_offset));
  job.first_block = first_block;
  job.codebook = &kCodebooks[quant_type];
  job.blocksize = blocksize;
  job.dtype = dtype;
  job.out = bytes(out);
  return run_decode(job, n, threads, *kernels);
}

}  // extern "C"

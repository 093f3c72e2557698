/* C interface of libqlf_cpu: the CPU kernels of the format's encoder and decoder (spec/format.md).
 *
 * Every function checks the arguments it can check and returns a status; none throws, allocates for longer than the
 * call, prints, or keeps a pointer. No pointer needs any alignment; buffers must not overlap. The floating-point
 * environment (rounding, FTZ, DAZ) is set to the default during a call and restored. Results are the same bits for
 * every instruction set and thread count.
 *
 * n counts elements, nb = ceil(n / blocksize) blocks. blocksize is a power of two from 32 to 4096. A tensor may be
 * encoded or decoded in pieces that start at a multiple of blocksize; only the last piece may have a ragged tail. */
#ifndef QLF_QLF_H
#define QLF_QLF_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QLF_ABI_VERSION 1
#define QLF_API __attribute__((visibility("default")))

enum { QLF_FLOAT32 = 0, QLF_FLOAT16 = 1, QLF_BFLOAT16 = 2 };
enum { QLF_NF4 = 0, QLF_FP4 = 1 };
enum { QLF_ISA_BEST = -1, QLF_ISA_SCALAR = 0, QLF_ISA_AVX2 = 1, QLF_ISA_AVX512 = 2, QLF_ISA_NEON = 3 };
enum {
  QLF_OK = 0,
  QLF_BAD_ARGUMENT = 1,    /* null pointer, unknown enumerator, size out of range */
  QLF_NOT_FINITE = 2,      /* a NaN or infinity in the input; outputs are unspecified */
  QLF_UNSUPPORTED_ISA = 3, /* not compiled in, or this processor lacks it */
  QLF_READ_FAILED = 4,     /* a file cannot be read, or there is no memory for it */
};

/* QLF_ABI_VERSION of the library; callers refuse another one. */
QLF_API int32_t qlf_abi_version(void);

/* 1 when the library holds this instruction set's kernels and the processor and system can run them, else 0. */
QLF_API int32_t qlf_isa_supported(int32_t isa);

/* Encode n elements of src. packed: ceil(n/2) bytes. absmax: float32 [nb]. moments: NULL, or float32 [nb][3] of
 * sum x*x, sum x*c, sum c*c (c = code value), summed in the order that the spec fixes. On QLF_NOT_FINITE,
 * *bad_block is the index of the first block that holds a NaN or infinity. */
QLF_API int32_t qlf_quantize(const void* src, int32_t dtype, uint64_t n, int32_t quant_type, uint32_t blocksize,
                             void* packed, void* absmax, void* moments, uint64_t* bad_block, int32_t threads,
                             int32_t isa);

/* Decode n elements to dtype with absmax float32 [nb]. */
QLF_API int32_t qlf_dequantize(const void* packed, const void* absmax, uint64_t n, int32_t quant_type,
                               uint32_t blocksize, int32_t dtype, void* out, int32_t threads, int32_t isa);

/* Decode n elements whose absmax is double-quantized, without materializing it. packed and q_absmax (uint8 [nb])
 * point at the piece, whose first block is block number first_block of the tensor; nested_absmax is the whole
 * tensor's, float32 [at least ceil((first_block + nb) / 256)]. nested_offset points at one float32: by value, a caller
 * in flush-to-zero mode could lose a subnormal one. */
QLF_API int32_t qlf_dequantize_nested(const void* packed, const void* q_absmax, const void* nested_absmax,
                                      const void* nested_offset, uint64_t first_block, uint64_t n, int32_t quant_type,
                                      uint32_t blocksize, int32_t dtype, void* out, int32_t threads, int32_t isa);

/* Quantize absmax float32 [nb], nb >= 1, to 8 bits: q uint8 [nb], nested_absmax float32 [ceil(nb/256)] and one offset.
 * On QLF_NOT_FINITE, *bad_block is the index of the first NaN or infinity. */
QLF_API int32_t qlf_double_quantize(const void* absmax, uint64_t nb, void* q, void* nested_absmax, void* nested_offset,
                                    uint64_t* bad_block, int32_t threads);

/* Decode q uint8 [nb] to absmax float32 [nb]. */
QLF_API int32_t qlf_double_dequantize(const void* q, const void* nested_absmax, const void* nested_offset, uint64_t nb,
                                      void* absmax);

/* Add to the squared error and squared norm of a tensor those of nb blocks, in order: decoded absmax float32 [nb],
 * moments float32 [nb][3]. A caller sets both to 0 before the first block. */
QLF_API int32_t qlf_squared_error(const void* absmax, const void* moments, uint64_t nb, double* squared_error,
                                  double* signal);

/* Transpose src [rows][cols] of 2- or 4-byte elements to out [cols][rows]. */
QLF_API int32_t qlf_transpose(const void* src, uint64_t rows, uint64_t cols, uint32_t itemsize, void* out,
                              int32_t threads);

/* Convert n elements of src to out_dtype: exactly where it is wider, else nearest with ties to even. A NaN keeps
 * its sign and as many upper bits as there is room for (0x7fc0 as bfloat16). *overflowed is 1 when a finite value
 * became an infinite float16, else 0. out may be src when both dtypes have one size. */
QLF_API int32_t qlf_convert(const void* src, int32_t dtype, uint64_t n, void* out, int32_t out_dtype,
                            int32_t* overflowed, int32_t isa);

/* Add a low-rank delta to elements [first, first + n) of a matrix of `columns` columns: base + scale * (left @ right)
 * in float32, converted as by qlf_convert. base and out point at element `first`, and may be the same as above. left is
 * float32 [rows][rank] of the whole matrix, right float32 [rank][columns], scale points at one float32. An element's
 * product starts at 0 and takes its terms in order, each by one fused multiply-add; rank is at least 1. */
QLF_API int32_t qlf_add_low_rank(const void* base, int32_t dtype, uint64_t columns, uint64_t first, uint64_t n,
                                 const void* left, const void* right, uint64_t rank, const void* scale, void* out,
                                 int32_t out_dtype, int32_t* overflowed, int32_t isa);

/* sha256 of a file and of its parts in one pass, for little more than one of them costs. 1 when the processor has the
 * instructions (SHA-NI), else 0; the other functions then return QLF_UNSUPPORTED_ISA. */
QLF_API int32_t qlf_sha256_supported(void);

/* Begin a hash in QLF_SHA256_BYTES bytes of the caller. */
#define QLF_SHA256_BYTES 112
QLF_API int32_t qlf_sha256_begin(void* hash);

/* Feed bytes [position, limit) of an open file to two hashes. At each of the `count` ends (uint64, ascending, none
 * before position; parts may be empty) the digest of `part` is written to `digests`, 32 bytes each, and it begins anew;
 * ends beyond limit are for a further call. *done is how many bytes there were; QLF_READ_FAILED when the system has an
 * error for the one after. */
QLF_API int32_t qlf_sha256_parts(void* whole, void* part, int32_t fd, uint64_t position, uint64_t limit,
                                 const void* ends, uint64_t count, void* digests, uint64_t* done);

/* The digest so far, 32 bytes; the hash may go on. */
QLF_API int32_t qlf_sha256_end(void* hash, void* digest);

#ifdef __cplusplus
}
#endif

#endif /* QLF_QLF_H */

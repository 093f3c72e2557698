// Runs every kernel over awkward sizes with heap buffers of exactly the documented size, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch, and checks that all instruction sets give the same bytes. Exit status 0 is good.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <memory>

#include "qlf/qlf.h"

namespace {

// `size` bytes that end at the end of their allocation and start at an odd address.
class Buffer {
 public:
  explicit Buffer(size_t size) : memory_(static_cast<unsigned char*>(malloc(size + 1))), size_(size) {
    if (!memory_) abort();
    memset(memory_.get(), 0xa5, size + 1);
  }
  unsigned char* data() const { return memory_.get() + 1; }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(unsigned char* p) const { free(p); }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  size_t size_;
};

bool equal(const Buffer& a, const Buffer& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size()) == 0;
}

int failures = 0;

void expect(bool condition, const char* what, size_t n, unsigned blocksize, int isa) {
  if (condition) return;
  fprintf(stderr, "failed: %s (n=%zu blocksize=%u isa=%d)\n", what, n, blocksize, isa);
  ++failures;
}

// Finite values of mixed magnitude, zeros among them.
void fill(const Buffer& buffer, int dtype) {
  unsigned state = 12345;
  const size_t element = dtype == QLF_FLOAT32 ? 4 : 2;
  for (size_t at = 0; at < buffer.size(); at += element) {
    state = state * 1664525u + 1013904223u;
    const unsigned kind = state >> 28;
    unsigned bits = (state >> 4) & 0xffffu;
    if (dtype == QLF_FLOAT16) bits = (bits & 0xbbffu) >> (kind == 0 ? 6 : 0);
    if (dtype == QLF_BFLOAT16) bits = (bits & 0x83ffu) | (kind == 0 ? 0 : 0x3c00u);
    if (dtype == QLF_FLOAT32) bits = (state & 0x83ffffffu) | (kind == 0 ? 0 : 0x3c000000u);
    memcpy(buffer.data() + at, &bits, element);
  }
}

struct Encoded {
  Buffer packed, absmax, moments;
  Encoded(size_t n, size_t nb) : packed((n + 1) / 2), absmax(nb * 4), moments(nb * 12) {}
};

void check(size_t n, unsigned blocksize, int dtype, int quant_type) {
  const size_t nb = (n + blocksize - 1) / blocksize, element = dtype == QLF_FLOAT32 ? 4 : 2;
  Buffer source(n * element);
  fill(source, dtype);
  Encoded expected(n, nb);
  Buffer plain(n * element), nested_out(n * element);
  Buffer q(nb), nested((nb + 255) / 256 * 4), decoded(nb * 4);
  float offset = 0.0f;
  uint64_t bad = 0;

  for (const int isa : {QLF_ISA_SCALAR, QLF_ISA_AVX2, QLF_ISA_AVX512, QLF_ISA_NEON}) {
    if (!qlf_isa_supported(isa)) continue;
    Encoded got(n, nb);
    const auto encode = [&](void* moments) {
      return qlf_quantize(source.data(), dtype, n, quant_type, blocksize, got.packed.data(), got.absmax.data(), moments,
                          &bad, 2, isa);
    };
    expect(encode(nullptr) == QLF_OK, "quantize", n, blocksize, isa);
    expect(encode(got.moments.data()) == QLF_OK, "quantize with moments", n, blocksize, isa);
    Buffer out(n * element), out_nested(n * element);
    expect(qlf_dequantize(got.packed.data(), got.absmax.data(), n, quant_type, blocksize, dtype, out.data(), 2, isa) ==
               QLF_OK,
           "dequantize", n, blocksize, isa);
    if (isa == QLF_ISA_SCALAR && nb) {
      expect(qlf_double_quantize(got.absmax.data(), nb, q.data(), nested.data(), &offset, &bad, 2) == QLF_OK,
             "double_quantize", n, blocksize, isa);
      expect(qlf_double_dequantize(q.data(), nested.data(), &offset, nb, decoded.data()) == QLF_OK, "double_dequantize",
             n, blocksize, isa);
      double error = 0.0, signal = 0.0;
      expect(qlf_squared_error(decoded.data(), got.moments.data(), nb, &error, &signal) == QLF_OK, "squared_error", n,
             blocksize, isa);
    }
    expect(qlf_dequantize_nested(got.packed.data(), q.data(), nested.data(), &offset, 0, n, quant_type, blocksize,
                                 dtype, out_nested.data(), 2, isa) == QLF_OK,
           "dequantize_nested", n, blocksize, isa);
    if (isa == QLF_ISA_SCALAR) {
      memcpy(expected.packed.data(), got.packed.data(), got.packed.size());
      memcpy(expected.absmax.data(), got.absmax.data(), got.absmax.size());
      memcpy(expected.moments.data(), got.moments.data(), got.moments.size());
      memcpy(plain.data(), out.data(), out.size());
      memcpy(nested_out.data(), out_nested.data(), out_nested.size());
    }
    expect(equal(expected.packed, got.packed), "packed bytes", n, blocksize, isa);
    expect(equal(expected.absmax, got.absmax), "absmax bytes", n, blocksize, isa);
    expect(equal(expected.moments, got.moments), "moment bytes", n, blocksize, isa);
    expect(equal(plain, out) && equal(nested_out, out_nested), "decoded bytes", n, blocksize, isa);
  }
}

// What a loader does: decode a tensor in pieces that begin a nested block, each from buffers of its own that hold no
// more.
void check_pieces(size_t n, unsigned blocksize, int dtype) {
  const size_t nb = (n + blocksize - 1) / blocksize, element = dtype == QLF_FLOAT32 ? 4 : 2, step = 256 * blocksize;
  Buffer source(n * element), packed((n + 1) / 2), absmax(nb * 4), q(nb), nested((nb + 255) / 256 * 4),
      whole(n * element);
  fill(source, dtype);
  float offset = 0.0f;
  uint64_t bad = 0;
  qlf_quantize(source.data(), dtype, n, QLF_NF4, blocksize, packed.data(), absmax.data(), nullptr, &bad, 1,
               QLF_ISA_BEST);
  qlf_double_quantize(absmax.data(), nb, q.data(), nested.data(), &offset, &bad, 1);
  qlf_dequantize_nested(packed.data(), q.data(), nested.data(), &offset, 0, n, QLF_NF4, blocksize, dtype, whole.data(),
                        1, QLF_ISA_BEST);
  for (size_t begin = 0; begin < n; begin += step) {
    const size_t count = n - begin < step ? n - begin : step, blocks = (count + blocksize - 1) / blocksize;
    Buffer codes((count + 1) / 2), scales(blocks), one(4), out(count * element), expected(count * element);
    memcpy(codes.data(), packed.data() + begin / 2, codes.size());
    memcpy(scales.data(), q.data() + begin / blocksize, blocks);
    memcpy(one.data(), nested.data() + begin / step * 4, 4);
    memcpy(expected.data(), whole.data() + begin * element, expected.size());
    for (const int isa : {QLF_ISA_SCALAR, QLF_ISA_AVX2, QLF_ISA_AVX512, QLF_ISA_NEON}) {
      if (!qlf_isa_supported(isa)) continue;
      expect(qlf_dequantize_nested(codes.data(), scales.data(), one.data(), &offset, 0, count, QLF_NF4, blocksize,
                                   dtype, out.data(), 1, isa) == QLF_OK &&
                 equal(out, expected),
             "a piece", n, blocksize, isa);
    }
  }
}

void check_transpose(size_t rows, size_t cols, unsigned itemsize) {
  Buffer source(rows * cols * itemsize), there(source.size()), back(source.size());
  for (size_t i = 0; i < source.size(); ++i) source.data()[i] = static_cast<unsigned char>(i * 37 + i / 251);
  expect(qlf_transpose(source.data(), rows, cols, itemsize, there.data(), 2) == QLF_OK, "transpose", rows, 0, 0);
  expect(qlf_transpose(there.data(), cols, rows, itemsize, back.data(), 2) == QLF_OK, "transpose", rows, 0, 0);
  expect(equal(source, back), "transpose twice", rows, 0, 0);
}

// A delta of `rank` on a range of a matrix, for every pair of dtypes; with rank 0, the conversion alone.
void check_merge(size_t rows, size_t columns, size_t rank, size_t first, size_t n) {
  Buffer left(rows * rank * 4), right(rank * columns * 4);
  fill(left, QLF_FLOAT32);
  fill(right, QLF_FLOAT32);
  const float scale = 0.75f;
  for (const int from : {QLF_FLOAT32, QLF_FLOAT16, QLF_BFLOAT16}) {
    for (const int to : {QLF_FLOAT32, QLF_FLOAT16, QLF_BFLOAT16}) {
      Buffer base(n * (from == QLF_FLOAT32 ? 4 : 2)), expected(n * (to == QLF_FLOAT32 ? 4 : 2));
      fill(base, from);
      for (const int isa : {QLF_ISA_SCALAR, QLF_ISA_AVX2, QLF_ISA_AVX512, QLF_ISA_NEON}) {
        if (!qlf_isa_supported(isa)) continue;
        Buffer out(expected.size());
        int32_t overflowed = -1;
        const int32_t status = rank ? qlf_add_low_rank(base.data(), from, columns, first, n, left.data(), right.data(),
                                                       rank, &scale, out.data(), to, &overflowed, isa)
                                    : qlf_convert(base.data(), from, n, out.data(), to, &overflowed, isa);
        expect(status == QLF_OK && overflowed == 0, "merge", n, static_cast<unsigned>(rank), isa);
        if (isa == QLF_ISA_SCALAR) memcpy(expected.data(), out.data(), out.size());
        expect(equal(out, expected), "merged values", n, static_cast<unsigned>(rank), isa);
      }
    }
  }
}

// A file and its parts, in one call and in several, with ends anywhere.
void check_hashes(size_t size, size_t step) {
  if (!qlf_sha256_supported()) return;
  Buffer data(size);
  for (size_t i = 0; i < size; ++i) data.data()[i] = static_cast<unsigned char>(i * 167 + i / 251);
  FILE* file = tmpfile();
  if (!file || fwrite(data.data(), 1, size, file) != size || fflush(file)) abort();
  const size_t count = size / step + 2;  // the last two are equal: an empty part
  Buffer ends(count * 8), once(count * 32), often(count * 32), whole(32), again(32);
  for (size_t i = 0; i < count; ++i) {
    const uint64_t end = (i + 1) * step < size ? (i + 1) * step : size;
    memcpy(ends.data() + i * 8, &end, 8);
  }
  uint64_t done = 0;
  for (const size_t limit : {size, step + step / 2 + 1}) {
    Buffer a(QLF_SHA256_BYTES), b(QLF_SHA256_BYTES);
    Buffer& digests = limit == size ? once : often;
    expect(qlf_sha256_begin(a.data()) == QLF_OK && qlf_sha256_begin(b.data()) == QLF_OK, "begin", size, 0, 0);
    size_t ended = 0;
    for (uint64_t at = 0; at < size || ended < count;) {
      const uint64_t stop = at + limit < size ? at + limit : size;
      const int32_t status = qlf_sha256_parts(a.data(), b.data(), fileno(file), at, stop, ends.data() + ended * 8,
                                              count - ended, digests.data() + ended * 32, &done);
      expect(status == QLF_OK && done == stop - at, "parts", size, static_cast<unsigned>(step), 0);
      at = stop;
      for (uint64_t end = 0; ended < count; ++ended) {
        memcpy(&end, ends.data() + ended * 8, 8);
        if (end > stop) break;
      }
    }
    qlf_sha256_end(a.data(), (limit == size ? whole : again).data());
  }
  expect(equal(once, often) && equal(whole, again), "hashes", size, static_cast<unsigned>(step), 0);
  fclose(file);
}

// Values that are not finite, and codes and scales that no encoder writes, must be handled without undefined behaviour.
void check_hostile() {
  const size_t n = 64 * 70 + 3, nb = 71;
  Buffer source(n * 4), packed((n + 1) / 2), absmax(nb * 4), moments(nb * 12), out(n * 4), q(nb), nested(4);
  const float huge = 3e38f;
  float offset = 0.0f;
  uint64_t bad = 0;
  int32_t overflowed = 0;
  for (const unsigned byte : {0xffu, 0x7fu, 0xa5u}) {
    for (const Buffer* buffer : {&source, &packed, &absmax, &q, &nested}) {
      memset(buffer->data(), static_cast<int>(byte), buffer->size());
    }
    for (const int isa : {QLF_ISA_SCALAR, QLF_ISA_AVX2, QLF_ISA_AVX512, QLF_ISA_NEON}) {
      if (!qlf_isa_supported(isa)) continue;
      for (const int dtype : {QLF_FLOAT32, QLF_FLOAT16, QLF_BFLOAT16}) {
        qlf_dequantize(packed.data(), absmax.data(), n, QLF_NF4, 64, dtype, out.data(), 1, isa);
        qlf_dequantize_nested(packed.data(), q.data(), nested.data(), &huge, 0, n, QLF_FP4, 64, dtype, out.data(), 1,
                              isa);
        qlf_quantize(source.data(), dtype, n, QLF_NF4, 64, packed.data(), absmax.data(), moments.data(), &bad, 1, isa);
        for (const int to : {QLF_FLOAT32, QLF_FLOAT16, QLF_BFLOAT16}) {
          qlf_convert(source.data(), dtype, n, out.data(), to, &overflowed, isa);
          qlf_add_low_rank(source.data(), dtype, 64, 7, n - 64, source.data(), source.data(), 9, &huge, out.data(), to,
                           &overflowed, isa);
        }
      }
    }
    memset(absmax.data(), static_cast<int>(byte), absmax.size());
    qlf_double_quantize(absmax.data(), nb, q.data(), nested.data(), &offset, &bad, 1);
  }
}

}  // namespace

int main() {
  const size_t large = (size_t{1} << 19) + 4097;  // several pieces of work: more than one thread
  for (const int dtype : {QLF_FLOAT32, QLF_FLOAT16, QLF_BFLOAT16}) {
    for (const int quant_type : {QLF_NF4, QLF_FP4}) {
      for (unsigned blocksize = 32; blocksize <= 4096; blocksize *= 2) {
        for (const size_t n : {size_t{0}, size_t{1}, size_t{2}, size_t{31}, size_t{33}, size_t{blocksize} - 1,
                               size_t{blocksize}, size_t{blocksize} + 1, size_t{blocksize} * 17 + 5}) {
          check(n, blocksize, dtype, quant_type);
        }
      }
    }
    check(large, 64, dtype, QLF_NF4);
    check_pieces(64 * 256 * 3 + 131, 64, dtype);
    check_pieces(32 * 256 + 1, 32, dtype);
  }
  for (const unsigned itemsize : {2u, 4u}) {
    for (const size_t rows : {1, 31, 33, 300}) {
      for (const size_t cols : {1, 32, 65, 700}) check_transpose(rows, cols, itemsize);
    }
  }
  for (const size_t rank : {size_t{0}, size_t{1}, size_t{5}, size_t{700}}) {
    for (const size_t columns : {size_t{1}, size_t{15}, size_t{48}, size_t{333}}) {
      const size_t rows = 19;
      check_merge(rows, columns, rank, 0, rows * columns);
      check_merge(rows, columns, rank, columns / 2, rows * columns - columns);
      check_merge(rows, columns, rank, columns + columns / 3, columns / 2);
      check_merge(rows, columns, rank, columns, 0);
    }
  }
  for (const size_t size : {1, 63, 64, 65, 1000, 600001}) {
    for (const size_t step : {1, 64, 77, 5000, 300000}) {
      if (size < 2000 || step > 1000) check_hashes(size, step);
    }
  }
  check_hostile();
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

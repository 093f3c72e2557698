// kernels/cuda as a shared library that runs on the CPU (cuda_shim.h). With QLF_DRIVER defined: a program that runs the
// kernels over awkward sizes with buffers of exact size, for AddressSanitizer and UndefinedBehaviorSanitizer to watch.
#include "cuda_shim.h"
// The kernels, as NVRTC sees them.
#include "../cuda/dequantize.cu"
#include "../cuda/quantize.cu"

namespace {

// Kernels that are wrong on purpose: the shim must notice.
void missing_barrier(unsigned* out) {
  __shared__ unsigned shared[256];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[255 - threadIdx.x];
  __syncthreads();
  shared[threadIdx.x] = 999;
}

void divergent_barrier(unsigned* out) {
  if (threadIdx.x != 7) __syncthreads();
  out[threadIdx.x] = 1;
}

#define QLF_KERNEL(name) \
  if (!strcmp(kernel, #name)) return shim::bind(name, parameters)

std::function<void()> bound(const char* kernel, void** parameters) {
  QLF_KERNEL(qlf_dequantize_bfloat16);
  QLF_KERNEL(qlf_dequantize_float16);
  QLF_KERNEL(qlf_dequantize_float32);
  QLF_KERNEL(qlf_dequantize_nested_bfloat16);
  QLF_KERNEL(qlf_dequantize_nested_float16);
  QLF_KERNEL(qlf_dequantize_nested_float32);
  QLF_KERNEL(qlf_quantize_bfloat16);
  QLF_KERNEL(qlf_quantize_float16);
  QLF_KERNEL(qlf_quantize_float32);
  QLF_KERNEL(qlf_absmax_sums);
  QLF_KERNEL(qlf_absmax_mean);
  QLF_KERNEL(qlf_quantize_absmax);
  QLF_KERNEL(missing_barrier);
  QLF_KERNEL(divergent_barrier);
  return nullptr;
}

}  // namespace

// Run blocks [first, last) of a grid. 0: done. 1: no such kernel. 2: a barrier was not reached by all threads.
extern "C" int shim_launch(const char* kernel, void** parameters, uint64_t grid, uint64_t first, uint64_t last,
                           uint32_t order) {
  const std::function<void()> body = bound(kernel, parameters);
  if (!body) return 1;
  return shim::launch(grid, first, last, order, body) ? 0 : 2;
}

#ifdef QLF_DRIVER
namespace {

int failures = 0;

void expect(bool condition, const char* what, uint64_t n, uint64_t blocksize) {
  if (condition) return;
  fprintf(stderr, "failed: %s (n=%llu blocksize=%llu)\n", what, static_cast<unsigned long long>(n),
          static_cast<unsigned long long>(blocksize));
  ++failures;
}

template <typename... Arguments>
bool run(const char* kernel, uint64_t grid, unsigned order, Arguments... arguments) {
  void* parameters[] = {&arguments...};
  return shim_launch(kernel, parameters, grid, 0, grid, order) == 0;
}

// `size` bytes on the heap that end where their allocation ends, `shift` bytes after a multiple of 16.
class Buffer {
 public:
  Buffer(size_t size, size_t shift) : memory_(static_cast<unsigned char*>(malloc(size + shift))), shift_(shift) {
    if (!memory_) abort();
    memset(memory_, 0xa5, size + shift);
  }
  ~Buffer() { free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* at() const { return memory_ + shift_; }

 private:
  unsigned char* memory_;
  size_t shift_;
};

constexpr const char* kSuffix[] = {"float32", "float16", "bfloat16"};

void check(uint64_t n, uint64_t log2, int dtype, uint64_t quant_type, size_t shift, unsigned order) {
  const uint64_t blocksize = uint64_t{1} << log2, blocks = (n + blocksize - 1) / blocksize,
                 nested = (blocks + 255) / 256;
  const size_t element = dtype == QLF_FLOAT32 ? 4 : 2;
  Buffer x(n * element, shift * element), out(n * element, shift * element), packed((n + 1) / 2, shift);
  Buffer absmax(blocks * 4, shift * 4), sums(nested * 8, 0), offset(4, 0), codes(blocks, shift),
      nested_absmax(nested * 4, 0);
  Buffer native_packed((n + 1) / 2, 0), native_absmax(blocks * 4, 0), native_out(n * element, 0);
  uint32_t state = static_cast<uint32_t>(n) * 2654435761u + 1;
  for (uint64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    const uint32_t bits = dtype == QLF_FLOAT32   ? (state & 0x83ffffffu) | 0x3c000000u
                          : dtype == QLF_FLOAT16 ? state >> 16 & 0xbbffu
                                                 : (state >> 16 & 0x83ffu) | 0x3c00u;
    memcpy(static_cast<char*>(x.at()) + i * element, &bits, element);
  }
  unsigned long long bad = ~0ull, bad_absmax = ~0ull;
  char name[64];
  snprintf(name, sizeof name, "qlf_quantize_%s", kSuffix[dtype]);
  expect(run(name, 2, order, x.at(), n, log2, quant_type, packed.at(), absmax.at(), &bad), "quantize", n, blocksize);
  expect(run("qlf_absmax_sums", 1, order, absmax.at(), blocks, sums.at(), &bad_absmax), "sums", n, blocksize);
  expect(run("qlf_absmax_mean", 1, order, sums.at(), blocks, offset.at()), "mean", n, blocksize);
  expect(run("qlf_quantize_absmax", 2, order, absmax.at(), blocks, offset.at(), codes.at(), nested_absmax.at()),
         "quantize_absmax", n, blocksize);
  expect(bad == ~0ull && bad_absmax == ~0ull, "finite input is reported", n, blocksize);
  const float mean = *static_cast<float*>(offset.at());
  void* const no_map = nullptr;
  snprintf(name, sizeof name, "qlf_dequantize_nested_%s", kSuffix[dtype]);
  expect(run(name, 2, order, packed.at(), codes.at(), nested_absmax.at(), no_map, mean, n, log2, quant_type, out.at()),
         "dequantize nested", n, blocksize);
  snprintf(name, sizeof name, "qlf_dequantize_%s", kSuffix[dtype]);
  expect(run(name, 2, order, packed.at(), absmax.at(), no_map, no_map, 0.0f, n, log2, quant_type, out.at()),
         "dequantize", n, blocksize);
}

}  // namespace

int main() {
  unsigned order = 0;
  for (const int dtype : {QLF_FLOAT32, QLF_FLOAT16, QLF_BFLOAT16}) {
    for (uint64_t quant_type = 0; quant_type < 2; ++quant_type) {
      for (const uint64_t log2 : {5, 6, 9, 12}) {
        const uint64_t size = uint64_t{1} << log2;
        for (const uint64_t n :
             {uint64_t{1}, uint64_t{2}, size - 1, size + 1, uint64_t{8192}, uint64_t{3} * 8192 + 77}) {
          check(n, log2, dtype, quant_type, n % 3, order++ % 4);
        }
      }
    }
  }
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
#endif

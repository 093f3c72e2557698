// The C interface of merging and converting, and the portable kernels.
#include "merge.h"

#include "fp_environment.h"
#include "qlf/qlf.h"

namespace qlf {
namespace {

constexpr uint64_t kMaxElements = uint64_t{1} << 48;

struct Portable {
  template <int kFrom, int kTo>
  static bool convert(const MergeJob& job) {
    bool overflowed = false;
    for (size_t i = 0; i < job.n; ++i) overflowed |= merge_element<kFrom, kTo>(job, i, 0.0f);
    return overflowed;
  }

  template <int kFrom, int kTo>
  static bool merge(const MergeJob& job, size_t row, size_t rows, size_t begin, size_t end) {
    bool overflowed = false;
    for (size_t i = 0; i < rows; ++i) overflowed |= merge_columns<kFrom, kTo>(job, row + i, begin, end);
    return overflowed;
  }
};

// Both sets of wide vectors on x86 take the AVX2 kernel: it waits for memory already.
MergeKernel kernel_of(int32_t isa) {
  if (isa != QLF_ISA_BEST && !qlf_isa_supported(isa)) return nullptr;
#if defined(__x86_64__) && !defined(QLF_SIMDE)
  static const bool fma = __builtin_cpu_supports("fma");
  if (fma && isa != QLF_ISA_SCALAR && qlf_isa_supported(QLF_ISA_AVX2)) return merge_avx2;
#endif
  return merge_scalar;
}

bool valid_dtype(int32_t dtype) {
  return dtype >= QLF_FLOAT32 && dtype <= QLF_BFLOAT16;
}

int32_t run(const MergeJob& job, int32_t* overflowed, int32_t isa) {
  const MergeKernel kernel = kernel_of(isa);
  if (!kernel) return QLF_UNSUPPORTED_ISA;
  const FpEnvironment environment;
  *overflowed = kernel(job) ? 1 : 0;
  return QLF_OK;
}

}  // namespace

bool merge_scalar(const MergeJob& job) {
  return merge_with<Portable>(job);
}

}  // namespace qlf

using namespace qlf;

extern "C" {

int32_t qlf_convert(const void* src, int32_t dtype, uint64_t n, void* out, int32_t out_dtype, int32_t* overflowed,
                    int32_t isa) {
  if (!valid_dtype(dtype) || !valid_dtype(out_dtype) || n >= kMaxElements || !overflowed) return QLF_BAD_ARGUMENT;
  if (n && (!src || !out)) return QLF_BAD_ARGUMENT;
  MergeJob job = {};
  job.base = static_cast<const uint8_t*>(src);
  job.base_dtype = dtype;
  job.n = static_cast<size_t>(n);
  job.out = static_cast<uint8_t*>(out);
  job.out_dtype = out_dtype;
  return run(job, overflowed, isa);
}

int32_t qlf_add_low_rank(const void* base, int32_t dtype, uint64_t columns, uint64_t first, uint64_t n,
                         const void* left, const void* right, uint64_t rank, const void* scale, void* out,
                         int32_t out_dtype, int32_t* overflowed, int32_t isa) {
  if (!valid_dtype(dtype) || !valid_dtype(out_dtype) || !scale || !overflowed) return QLF_BAD_ARGUMENT;
  if (!columns || !rank || columns >= kMaxElements || first >= kMaxElements || n >= kMaxElements) {
    return QLF_BAD_ARGUMENT;
  }
  if (rank >= kMaxElements || (n && (!base || !left || !right || !out))) return QLF_BAD_ARGUMENT;
  MergeJob job = {};
  job.base = static_cast<const uint8_t*>(base);
  job.base_dtype = dtype;
  job.columns = static_cast<size_t>(columns);
  job.first = static_cast<size_t>(first);
  job.n = static_cast<size_t>(n);
  job.left = static_cast<const uint8_t*>(left);
  job.right = static_cast<const uint8_t*>(right);
  job.rank = static_cast<size_t>(rank);
  job.scale = load_f32(static_cast<const uint8_t*>(scale));
  job.out = static_cast<uint8_t*>(out);
  job.out_dtype = out_dtype;
  if (!n) {
    *overflowed = 0;
    return kernel_of(isa) ? QLF_OK : QLF_UNSUPPORTED_ISA;
  }
  return run(job, overflowed, isa);
}

}  // extern "C"

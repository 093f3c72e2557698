// The calling process may have set FTZ, DAZ or another rounding mode (torch can); the format's arithmetic allows none.
#pragma once

#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace qlf {
namespace {

class FpEnvironment {
 public:
#if defined(__x86_64__) || defined(__i386__)
  FpEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // round to nearest, no FTZ or DAZ, no traps
  ~FpEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FpEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
  }
  ~FpEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
  uint64_t saved_;
#else
 public:
  FpEnvironment() = default;
  ~FpEnvironment() {}
#endif

 public:
  FpEnvironment(const FpEnvironment&) = delete;
  FpEnvironment& operator=(const FpEnvironment&) = delete;
};

}  // namespace
}  // namespace qlf

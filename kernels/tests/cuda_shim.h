// Runs CUDA kernels on the CPU, for tests: included before a .cu file, it defines the parts of CUDA C++ that the
// kernels use. The threads of a block are fibers (ucontext) that take turns, and a barrier or a shuffle hands over to
// the others. So a block behaves as on a GPU whose scheduler picks the order of the threads: the launch says which, and
// a kernel that lacks a barrier gives other results in some order. A barrier that not all threads reach, or a shuffle
// that not all lanes reach, ends the launch with an error. Blocks run one after another and share the static __shared__
// memory, which keeps what the block before left in it, as on a GPU.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "../cpu/fp_environment.h"
#include "../cpu/numeric.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define QLF_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

namespace shim {

struct Index {
  unsigned x;
};

constexpr unsigned kWarp = 32;
constexpr unsigned kBlock = 256;
constexpr size_t kStack = 256 << 10;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;  // after the first entry: swapcontext would make two system calls each time
  bool entered = false;
  State state = State::kReady;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
  unsigned posted = 0;         // the value that a shuffle gives to the other lanes
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kBlock);
  std::function<void()> body;
  Index block{0}, grid{1};
  unsigned current = 0;
  unsigned order = 0;  // 0 ascending, 1 descending, else the seed of a random order
  ucontext_t entry;
  jmp_buf scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

inline Machine machine;

inline void start_switch(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}

inline void finish_switch(void* saved, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#else
  (void)saved, (void)bottom, (void)size;
#endif
}

// Hand over to the scheduler in this state; returns when it resumes this thread.
inline void yield(State state) {
  Fiber& self = machine.fibers[machine.current];
  self.state = state;
  start_switch(state == State::kDone ? nullptr : &self.fake_stack, machine.scheduler_stack,
               machine.scheduler_stack_size);
  if (!_setjmp(self.resume)) _longjmp(machine.scheduler, 1);
  finish_switch(self.fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_size);
}

inline void run_thread() {
  finish_switch(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
  machine.body();
  yield(State::kDone);
}

inline void resume(unsigned thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  start_switch(&machine.scheduler_fake_stack, fiber.stack.get(), kStack);
  if (!_setjmp(machine.scheduler)) {
    if (fiber.entered) _longjmp(fiber.resume, 1);
    fiber.entered = true;
    setcontext(&fiber.context);
  }
  finish_switch(machine.scheduler_fake_stack, nullptr, nullptr);
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.entered = false;
  fiber.state = State::kReady;
  makecontext(&fiber.context, run_thread, 0);
}

// Wake a group of threads when all of them wait for it. Whether any was woken.
inline bool release(unsigned first, unsigned count, State waiting) {
  for (unsigned t = first; t < first + count; ++t) {
    if (machine.fibers[t].state != waiting) return false;
  }
  for (unsigned t = first; t < first + count; ++t) machine.fibers[t].state = State::kReady;
  return true;
}

// The threads of one block, in the order that they take turns.
class Turns {
 public:
  Turns() : seed_(machine.order * 2654435761u + machine.block.x) {
    for (unsigned t = 0; t < kBlock; ++t) threads_[t] = machine.order == 1 ? kBlock - 1 - t : t;
  }

  // In the fixed orders all threads go on in step, as far as their next barrier or shuffle. In a random order one warp
  // after another goes as far ahead of the others as it can.
  void take() {
    if (machine.order < 2) {
      for (const unsigned t : threads_) run(t);
      return;
    }
    shuffle();
    unsigned warps[kBlock / kWarp] = {};
    for (unsigned w = 0; w < kBlock / kWarp; ++w) warps[w] = threads_[w] % (kBlock / kWarp);  // some come up twice
    for (const unsigned warp : warps) {
      do {
        for (const unsigned t : threads_) {
          if (t / kWarp == warp) run(t);
        }
      } while (release(warp * kWarp, kWarp, State::kAtWarpBarrier));
    }
  }

 private:
  static void run(unsigned thread) {
    if (machine.fibers[thread].state == State::kReady) resume(thread);
  }

  void shuffle() {
    for (unsigned t = kBlock - 1; t; --t) {
      seed_ = seed_ * 1664525u + 1013904223u;
      std::swap(threads_[t], threads_[(seed_ >> 8) % (t + 1)]);
    }
  }

  unsigned seed_;
  unsigned threads_[kBlock];
};

// One thread block. False when threads wait for others that never come.
inline bool run_block() {
  for (Fiber& fiber : machine.fibers) prepare(fiber);
  const auto ready = [](const Fiber& fiber) { return fiber.state == State::kReady; };
  const auto done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  for (Turns turns;;) {
    turns.take();
    bool woken = std::any_of(machine.fibers.begin(), machine.fibers.end(), ready);
    for (unsigned warp = 0; warp < kBlock; warp += kWarp) woken |= release(warp, kWarp, State::kAtWarpBarrier);
    woken |= release(0, kBlock, State::kAtBlockBarrier);
    if (!woken) return std::all_of(machine.fibers.begin(), machine.fibers.end(), done);
  }
}

// Blocks `first` to `last - 1` of a grid. False: a barrier or shuffle was not reached by all.
inline bool launch(uint64_t grid, uint64_t first, uint64_t last, unsigned order, std::function<void()> body) {
  const qlf::FpEnvironment environment;
  machine.body = std::move(body);
  machine.grid.x = static_cast<unsigned>(grid);
  machine.order = order;
  for (uint64_t block = first; block < last; ++block) {
    machine.block.x = static_cast<unsigned>(block);
    if (!run_block()) return false;
  }
  return true;
}

// The parameters of a kernel come as CUDA's own launch takes them: an array of pointers to them.
template <typename... Parameters, size_t... kAt>
void call_with(void (*kernel)(Parameters...), void** parameters, std::index_sequence<kAt...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(parameters[kAt])...);
}

template <typename... Parameters>
std::function<void()> bind(void (*kernel)(Parameters...), void** parameters) {
  return [=] { call_with(kernel, parameters, std::index_sequence_for<Parameters...>{}); };
}

}  // namespace shim

#define threadIdx (shim::Index{shim::machine.current})
#define blockIdx (shim::machine.block)
#define gridDim (shim::machine.grid)

inline void __syncthreads() {
  shim::yield(shim::State::kAtBlockBarrier);
}

inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, unsigned apart) {
  if (mask != 0xffffffffu) abort();  // the kernels use whole warps only
  const unsigned self = shim::machine.current;
  shim::machine.fibers[self].posted = value;
  shim::yield(shim::State::kAtWarpBarrier);
  const unsigned received = shim::machine.fibers[self ^ apart].posted;
  shim::yield(shim::State::kAtWarpBarrier);
  return received;
}

inline void atomicMin(unsigned long long* to, unsigned long long value) {
  *to = std::min(*to, value);
}

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}

using qlf::bfloat_of;
using qlf::half_of;
using qlf::half_to_float;
using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) {
  return qlf::float_of(bits);
}
inline unsigned __float_as_uint(float value) {
  return qlf::bits_of(value);
}
// Compiled without contraction and for SSE2 or NEON, each is one correctly rounded operation.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __ddiv_rn(double a, double b) {
  return a / b;
}
inline float __double2float_rn(double a) {
  return static_cast<float>(a);
}

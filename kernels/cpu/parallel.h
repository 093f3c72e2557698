// Fan-out over threads that live for one call: nothing survives a fork, and an idle library holds no threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>

#include "fp_environment.h"

namespace qlf {
namespace {

constexpr int kMaxThreads = 256;

// Call work(i) for i in [0, count), each once, on up to `threads` threads including this one. Which thread takes
// which i is left to chance, so the result of work must not depend on it.
template <class Work>
void for_each_piece(size_t count, int threads, const Work& work) {
  std::atomic<size_t> next{0};
  const auto run = [&next, count, &work] {
    const FpEnvironment environment;
    for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      work(i);
    }
  };
  std::thread helpers[kMaxThreads];
  int started = 0;
  // Starting a thread costs some 20 microseconds, about what a piece takes: it must find at least two.
  const int wanted = count / 2 < static_cast<size_t>(threads) ? static_cast<int>(count / 2) : threads;
  try {
    while (started + 1 < wanted) {
      helpers[started] = std::thread(run);
      ++started;
    }
  } catch (...) {
    // No more threads to be had: those that started, at least this one, do all the work.
  }
  run();
  for (int i = 0; i < started; ++i) helpers[i].join();
}

}  // namespace
}  // namespace qlf

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "tests/bench/harness.h"

namespace mvgpu::bench {

inline constexpr size_t kThreads = 2;

// Runs work(thread) in `count` threads, each on a processor of its own, at the same time. Returns
// the ns from the start until the last one is done, for each of `units` units of work.
template <typename Work>
double Together(size_t count, uint64_t units, const Work& work) {
  std::atomic<size_t> waiting{0};
  std::array<double, kThreads> start{};
  std::array<double, kThreads> end{};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      StayOn(i);
      RunBeforeOthers();
      waiting.fetch_add(1);
      while (waiting.load() != count) {
      }
      start[i] = NsOf(CLOCK_MONOTONIC);
      work(i);
      end[i] = NsOf(CLOCK_MONOTONIC);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double taken =
      *std::max_element(end.begin(), end.begin() + static_cast<ptrdiff_t>(count)) -
      *std::min_element(start.begin(), start.begin() + static_cast<ptrdiff_t>(count));
  return taken / static_cast<double>(units);
}

}  // namespace mvgpu::bench

#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "apionly-domain/base/check.h"
#include "backend/policies/dma_trace.h"

namespace mvgpu::testing {

// Puts a trace together by page numbers and seconds; what does not fit ends the test program.
class TraceMaker {
 public:
  static constexpr uint64_t kSecond = 1'000'000'000;

  explicit TraceMaker(uint64_t memory) {
    for (const IovaRange& range : backend::PcMemory(memory)) builder_.add_memory(range);
  }
  uint32_t buffer(std::vector<PageRun> parts,
                  dma::Direction direction = dma::Direction::kBidirectional) {
    std::vector<IovaRange> ranges;
    for (const PageRun& part : parts) ranges.push_back(RangeOf(part));
    const auto added = builder_.add_buffer(ranges, direction);
    MVGPU_CHECK(added.has_value());
    return *added;
  }
  void map(uint64_t time_ns, uint32_t id) { MVGPU_CHECK(builder_.map(time_ns, id).has_value()); }
  void unmap(uint64_t time_ns, uint32_t id) {
    MVGPU_CHECK(builder_.unmap(time_ns, id).has_value());
  }
  void use(uint64_t time_ns, uint32_t id) {
    map(time_ns, id);
    access(time_ns, id);
  }
  void access(uint64_t time_ns, uint32_t id) {
    MVGPU_CHECK(builder_.access_all(time_ns, id).has_value());
  }
  backend::DmaTrace make() {
    auto trace = std::move(builder_).build();
    MVGPU_CHECK(trace.has_value());
    return *std::move(trace);
  }

 private:
  backend::DmaTraceBuilder builder_{"test"};
};

}  // namespace mvgpu::testing

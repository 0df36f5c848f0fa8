#pragma once

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "backend/policies/dma_text_import.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::testing {

// In the frame of ftrace, at so many microseconds.
inline std::string Line(const std::string& event, unsigned us = 0) {
  std::ostringstream line;
  line << "    kworker/0:1-42      [001] d..1. 12." << 100000 + us << ": " << event << "\n";
  return line.str();
}

inline Result<backend::DmaTrace> Import(const std::string& text, uint64_t memory = 0) {
  std::istringstream lines(text);
  return backend::ImportDmaText(lines, "t.txt", {memory});
}

inline std::string MessageOf(const std::string& text, ErrorCode code = ErrorCode::kCorrupt) {
  const auto trace = Import(text);
  EXPECT_THAT(trace, FailsWith(code)) << text;
  return trace ? std::string() : trace.error().message();
}

inline std::vector<backend::DmaEvent::Kind> KindsOf(const backend::DmaTrace& trace) {
  std::vector<backend::DmaEvent::Kind> kinds;
  for (const backend::DmaEvent& event : trace.events) kinds.push_back(event.kind);
  return kinds;
}

// The pages that are mapped when the trace ends, each as often as it is.
inline std::vector<uint64_t> MappedAtTheEnd(const backend::DmaTrace& trace) {
  std::vector<bool> is_mapped(trace.buffers.size());
  for (const backend::DmaEvent& event : trace.events) {
    if (event.kind == backend::DmaEvent::Kind::kMap) is_mapped[event.buffer] = true;
    if (event.kind == backend::DmaEvent::Kind::kUnmap) is_mapped[event.buffer] = false;
  }
  std::vector<uint64_t> pages;
  for (size_t i = 0; i < is_mapped.size(); ++i) {
    if (!is_mapped[i]) continue;
    for (const PageRun& part : trace.buffers[i].parts) {
      for (uint64_t page = part.first; page < part.end(); ++page) pages.push_back(page);
    }
  }
  return pages;
}

}  // namespace mvgpu::testing

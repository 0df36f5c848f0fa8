#pragma once

// Events of the Linux kernel as people get them to read: lines of tracefs' `trace` file, of
// `trace-cmd report` and of `perf script`. What comes before the event differs; all have the time
// in seconds, a colon, the event's name, with perf its subsystem's in front, a colon and the
// fields.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/error.h"

namespace mvgpu::backend {

// One event, cut out of its line; the views are into that.
struct KernelEvent {
  std::string_view system;  // `iommu` of `iommu:map`; empty where the line does not say
  std::string_view name;
  std::string_view fields;  // without the blanks in front
  uint64_t time_ns = 0;     // on the clock of the trace
};

// nullopt: there is no event in this line. Any bytes will do.
std::optional<KernelEvent> FindKernelEvent(std::string_view line);

// What stands behind `key=`, up to the next blank.
std::optional<std::string_view> FieldOf(std::string_view fields, std::string_view key);
// The whole of the text; `0x` in front makes it hexadecimal in any case.
std::optional<uint64_t> ParseNumber(std::string_view text, int base);
// Error: kCorrupt, there is no such field or no number below 2^64 in it.
Result<uint64_t> NumberOf(const KernelEvent& event, std::string_view key, int base = 10);
// {0x1,0x2}; error as above.
Result<std::vector<uint64_t>> ListOf(const KernelEvent& event, std::string_view key);

// For messages: in quotes, without what a terminal could take for more than a letter, and cut.
std::string Quoted(std::string_view text);

}  // namespace mvgpu::backend

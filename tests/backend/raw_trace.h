#pragma once

// Traces taken apart and put together by the tests' own means: the numbers stand here once more, so
// that a mistake in the format's own header shows.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mvgpu::testing {

enum RawType : uint64_t {
  kRawSession = 1,
  kRawMap = 2,
  kRawUnmap = 3,
  kRawUnmapAll = 4,
  kRawWrite = 5,
  kRawRead = 6,
  kRawIrqs = 7,
  kRawReset = 8,
  kRawMemory = 9,
  kRawStep = 10,
  kRawRequest = 11,
  kRawResponse = 12,
  kRawFrame = 13,
  kRawSummary = 14,
  kRawAccounts = 15,
};

using RawBytes = std::vector<std::byte>;

RawBytes RawOf(std::string_view text);
void AppendVarint(RawBytes& bytes, uint64_t value);
// Numbers as varints, then bytes.
RawBytes RawPayload(std::initializer_list<uint64_t> numbers, std::span<const std::byte> bytes = {});

struct RawRecord {
  uint64_t type = 0;
  uint64_t since_ns = 0;
  RawBytes payload;

  // The n-th varint of the payload. REQUIRES: it is there.
  uint64_t number(size_t n) const;
  // What stands behind the first n varints.
  RawBytes bytes_after(size_t n) const;
  bool operator==(const RawRecord&) const = default;
};

// A whole file: header, zstd stream.
RawBytes EncodeTrace(const std::vector<RawRecord>& records);
// The header, and a zstd stream of these bytes.
RawBytes EncodeStream(std::span<const std::byte> stream);
RawBytes EncodeRecords(const std::vector<RawRecord>& records);

// nullopt when it is not a whole trace.
std::optional<std::vector<RawRecord>> DecodeTrace(std::span<const std::byte> file);

RawBytes ReadFile(const std::string& path);
void WriteFile(const std::string& path, std::span<const std::byte> bytes);

}  // namespace mvgpu::testing

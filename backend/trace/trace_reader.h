#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "backend/trace/byte_codec.h"
#include "backend/trace/trace_format.h"

struct ZSTD_DCtx_s;

namespace mvgpu::backend {

struct TraceRecord {
  TraceType type;
  uint64_t time_ns = 0;                // since the first record
  std::span<const std::byte> payload;  // valid until the next call of next()
};

// Reads a trace from a file or from memory. The file is not trusted: lengths are bounded, nothing
// is believed before it is checked. Not thread-safe.
class TraceReader {
 public:
  // Errors: kSystem (cannot be opened), kCorrupt (no trace, another version).
  static Result<std::unique_ptr<TraceReader>> Open(const std::string& path);
  // The bytes must outlive the reader. `name` stands in messages.
  static Result<std::unique_ptr<TraceReader>> FromBytes(std::span<const std::byte> bytes,
                                                        std::string name);
  ~TraceReader();

  // The next record; nullopt at the end of the trace, also where a killed writer left it
  // (is_cut_short()). kCorrupt when the bytes cannot be a trace.
  Result<std::optional<TraceRecord>> next();

  bool is_cut_short() const { return cut_short_; }
  // Of the compressed file, for a progress bar.
  uint64_t bytes_read() const { return bytes_read_; }
  uint64_t bytes_total() const { return bytes_total_; }
  const std::string& name() const { return name_; }

 private:
  explicit TraceReader(std::string name);
  Result<void> ReadHeader();
  // Makes at least `size` decompressed bytes available; false at the end.
  Result<bool> Fill(size_t size);
  Result<bool> Refill();
  Error Corrupt(std::string_view what) const;

  const std::string name_;
  UniqueFd fd_;                        // of a file
  std::span<const std::byte> memory_;  // or bytes
  ZSTD_DCtx_s* const zstd_;
  std::vector<char> input_;
  size_t input_size_ = 0;
  size_t input_position_ = 0;
  std::vector<std::byte> output_;
  size_t output_position_ = 0;  // of the next record in output_
  uint64_t bytes_read_ = 0;
  uint64_t bytes_total_ = 0;
  uint64_t time_ns_ = 0;
  uint64_t records_ = 0;
  bool at_end_ = false;
  bool frame_open_ = true;
  bool cut_short_ = false;
};

}  // namespace mvgpu::backend

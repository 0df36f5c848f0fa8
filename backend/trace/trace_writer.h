#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "backend/session_observer.h"
#include "backend/trace/byte_codec.h"
#include "backend/trace/trace_format.h"

struct ZSTD_CCtx_s;

namespace mvgpu::backend {

// Writes a trace (trace_format.h). Not thread-safe: everything it hears of happens under the vGPU's
// lock, and the order of the calls is the order of the trace.
//
// A write error (disk full) ends the recording, not the VM: finish() says so.
class TraceWriter final : public SessionObserver {
 public:
  // Whether Create() could open the file; makes it if it is not there. Errors: kSystem.
  static Result<void> CheckPath(const std::string& path);
  // Creates or truncates the file, mode 0600: a trace holds guest memory. Errors: kSystem.
  static Result<std::unique_ptr<TraceWriter>> Create(const std::string& path);
  ~TraceWriter() override;

  void session(std::string_view json) { text_record(TraceType::kSession, json); }

  void on_map(IovaRange range, domain::Access access, const Backing& backing) override;
  void on_unmap(Iova start, uint64_t size) override;
  void on_unmap_all() override;
  void on_region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) override;
  void on_region_read(uint32_t region, uint64_t offset, std::span<const std::byte> answer) override;
  void on_irqs(uint32_t irq, TraceIrqOp operation, uint32_t start, uint32_t count) override;
  void on_reset() override;
  void on_step(uint16_t queue) override;
  void on_request(uint16_t queue, std::span<const std::byte> bytes) override;
  void on_response(uint16_t queue, std::span<const std::byte> bytes) override;
  void on_frame(uint32_t scanout, gpu::Size size, uint64_t hash) override;
  void on_accounts(const AccountFigures& figures) override;
  void on_guest_read(Iova iova, std::span<const std::byte> bytes) override;

  // Ends the trace: the summary, the end of the zstd stream, fsync. Returns the first error of the
  // recording.
  Result<void> finish(std::string_view summary_json);

  const std::string& path() const { return path_; }
  uint64_t records() const { return records_; }
  uint64_t file_bytes() const { return file_bytes_; }

 private:
  TraceWriter(std::string path, UniqueFd fd);
  void record(TraceType type, std::span<const std::byte> payload);
  void bytes_record(TraceType type, std::initializer_list<uint64_t> numbers,
                    std::span<const std::byte> bytes);
  void text_record(TraceType type, std::string_view text) {
    record(type, std::as_bytes(std::span(text)));
  }
  // `mode` is a ZSTD_EndDirective.
  void compress(std::span<const std::byte> bytes, int mode);
  void write_out(const char* data, size_t size);

  const std::string path_;
  UniqueFd fd_;
  ZSTD_CCtx_s* const zstd_;
  std::vector<char> output_;
  ByteWriter payload_;
  ByteWriter head_;
  absl::flat_hash_map<domain::FileIdentity, uint64_t> file_numbers_;  // from 1
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  uint64_t unflushed_ = 0;  // bytes given to zstd since the last flush
  uint64_t records_ = 0;
  uint64_t file_bytes_ = 0;
  Result<void> status_;
  bool finished_ = false;
};

}  // namespace mvgpu::backend

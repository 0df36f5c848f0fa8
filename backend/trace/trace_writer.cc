#include "backend/trace/trace_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <array>

namespace mvgpu::backend {

namespace {

// What a killed backend may lose of its trace: a flush costs compression, so it is not done per
// record.
constexpr uint64_t kFlushBytes = 256u << 10;
constexpr int kCompressionLevel = 6;

}  // namespace

Result<void> TraceWriter::CheckPath(const std::string& path) {
  const UniqueFd fd(open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  if (!fd.is_valid()) return FailSystem(errno, fmt::format("cannot create the trace {}", path));
  return {};
}

Result<std::unique_ptr<TraceWriter>> TraceWriter::Create(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  struct stat status = {};
  if (!fd.is_valid() || fstat(fd.get(), &status) != 0) {
    return FailSystem(errno, fmt::format("cannot create the trace {}", path));
  }
  // Also a file that was there before is closed to others, before guest memory goes into it.
  if (S_ISREG(status.st_mode) && fchmod(fd.get(), 0600) != 0) {
    return FailSystem(errno, fmt::format("cannot make the trace {} private", path));
  }
  std::unique_ptr<TraceWriter> writer(new TraceWriter(path, std::move(fd)));
  std::array<char, kTraceHeaderSize> header = {};
  std::copy(kTraceMagic.begin(), kTraceMagic.end(), header.begin());
  header[8] = static_cast<char>(kTraceVersion);
  writer->write_out(header.data(), header.size());
  if (!writer->status_) return tl::unexpected<Error>(writer->status_.error());
  return writer;
}

TraceWriter::TraceWriter(std::string path, UniqueFd fd)
    : path_(std::move(path)),
      fd_(std::move(fd)),
      zstd_(ZSTD_createCCtx()),
      output_(ZSTD_CStreamOutSize()) {
  ZSTD_CCtx_setParameter(zstd_, ZSTD_c_compressionLevel, kCompressionLevel);
  ZSTD_CCtx_setParameter(zstd_, ZSTD_c_checksumFlag, 1);
  // Frames repeat: a window of 32 MiB lets a transferred picture refer to the one before it.
  ZSTD_CCtx_setParameter(zstd_, ZSTD_c_windowLog, 25);
}

TraceWriter::~TraceWriter() {
  if (!finished_) compress({}, ZSTD_e_end);
  ZSTD_freeCCtx(zstd_);
}

void TraceWriter::on_map(IovaRange range, domain::Access access, const Backing& backing) {
  uint64_t file = 0;
  if (backing.exists) {
    file = file_numbers_.try_emplace(backing.identity, file_numbers_.size() + 1).first->second;
  }
  bytes_record(TraceType::kMap,
               {range.start().value(), range.size(), static_cast<uint64_t>(access), file,
                backing.offset, backing.file_size},
               {});
}

void TraceWriter::on_unmap(Iova start, uint64_t size) {
  bytes_record(TraceType::kUnmap, {start.value(), size}, {});
}

void TraceWriter::on_unmap_all() { record(TraceType::kUnmapAll, {}); }

void TraceWriter::on_region_write(uint32_t region, uint64_t offset,
                                  std::span<const std::byte> data) {
  bytes_record(TraceType::kWrite, {region, offset}, data);
}

void TraceWriter::on_region_read(uint32_t region, uint64_t offset,
                                 std::span<const std::byte> answer) {
  bytes_record(TraceType::kRead, {region, offset}, answer);
}

void TraceWriter::on_irqs(uint32_t irq, TraceIrqOp operation, uint32_t start, uint32_t count) {
  bytes_record(TraceType::kIrqs, {irq, static_cast<uint64_t>(operation), start, count}, {});
}

void TraceWriter::on_reset() { record(TraceType::kReset, {}); }

void TraceWriter::on_step(uint16_t queue) { bytes_record(TraceType::kStep, {queue}, {}); }

void TraceWriter::on_request(uint16_t queue, std::span<const std::byte> bytes) {
  bytes_record(TraceType::kRequest, {queue}, bytes);
}

void TraceWriter::on_response(uint16_t queue, std::span<const std::byte> bytes) {
  bytes_record(TraceType::kResponse, {queue}, bytes);
}

void TraceWriter::on_frame(uint32_t scanout, gpu::Size size, uint64_t hash) {
  payload_.clear();
  payload_.varint(scanout);
  payload_.varint(size.width);
  payload_.varint(size.height);
  payload_.fixed64(hash);
  record(TraceType::kFrame, payload_.view());
}

void TraceWriter::on_accounts(const AccountFigures& figures) {
  payload_.clear();
  figures.write_to(payload_);
  record(TraceType::kAccounts, payload_.view());
}

void TraceWriter::on_guest_read(Iova iova, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const auto piece = bytes.first(std::min<size_t>(bytes.size(), kMaxMemoryRecord));
    bytes_record(TraceType::kMemory, {iova.value()}, piece);
    bytes = bytes.subspan(piece.size());
    iova = iova + piece.size();
  }
}

Result<void> TraceWriter::finish(std::string_view summary_json) {
  text_record(TraceType::kSummary, summary_json);
  compress({}, ZSTD_e_end);
  finished_ = true;
  if (status_ && fsync(fd_.get()) != 0 && errno != EINVAL && errno != EROFS) {
    status_ = FailSystem(errno, fmt::format("fsync of the trace {}", path_));
  }
  return status_;
}

void TraceWriter::bytes_record(TraceType type, std::initializer_list<uint64_t> numbers,
                               std::span<const std::byte> bytes) {
  payload_.clear();
  for (const uint64_t number : numbers) payload_.varint(number);
  payload_.bytes(bytes);
  record(type, payload_.view());
}

void TraceWriter::record(TraceType type, std::span<const std::byte> payload) {
  const auto now = std::chrono::steady_clock::now();
  const auto since = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
  last_ = now;
  head_.clear();
  head_.varint(static_cast<uint64_t>(type));
  head_.varint(static_cast<uint64_t>(std::max<int64_t>(since, 0)));
  head_.varint(payload.size());
  compress(head_.view(), ZSTD_e_continue);
  compress(payload, ZSTD_e_continue);
  ++records_;
  unflushed_ += head_.view().size() + payload.size();
  if (unflushed_ >= kFlushBytes) compress({}, ZSTD_e_flush);
}

void TraceWriter::compress(std::span<const std::byte> bytes, int mode) {
  ZSTD_inBuffer input{bytes.data(), bytes.size(), 0};
  const auto directive = static_cast<ZSTD_EndDirective>(mode);
  while (status_) {
    ZSTD_outBuffer output{output_.data(), output_.size(), 0};
    const size_t left = ZSTD_compressStream2(zstd_, &output, &input, directive);
    if (ZSTD_isError(left)) {
      status_ = Fail(ErrorCode::kSystem,
                     fmt::format("compressing the trace {}: {}", path_, ZSTD_getErrorName(left)));
      return;
    }
    write_out(output_.data(), output.pos);
    const bool done = directive == ZSTD_e_continue ? input.pos == input.size : left == 0;
    if (done) break;
  }
  if (directive != ZSTD_e_continue) unflushed_ = 0;
}

void TraceWriter::write_out(const char* data, size_t size) {
  while (status_ && size > 0) {
    const ssize_t written = write(fd_.get(), data, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      status_ = FailSystem(errno, fmt::format("writing the trace {}, it ends here", path_));
      return;
    }
    data += written;
    size -= static_cast<size_t>(written);
    file_bytes_ += static_cast<uint64_t>(written);
  }
}

}  // namespace mvgpu::backend

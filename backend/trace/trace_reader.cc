#include "backend/trace/trace_reader.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <array>

namespace mvgpu::backend {

namespace {

// type, two varints of at most ten bytes each
constexpr size_t kMaxRecordHead = 1 + 10 + 10;
// Refuses files that ask for more memory than a trace of ours needs (its window is 32 MiB).
constexpr int kMaxWindowLog = 27;

}  // namespace

Result<std::unique_ptr<TraceReader>> TraceReader::Open(const std::string& path) {
  std::unique_ptr<TraceReader> reader(new TraceReader(path));
  // O_NONBLOCK: a FIFO is refused below, not waited for.
  reader->fd_.reset(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status = {};
  if (!reader->fd_.is_valid() || fstat(reader->fd_.get(), &status) != 0) {
    return FailSystem(errno, fmt::format("cannot read the trace {}", path));
  }
  if (!S_ISREG(status.st_mode)) {
    return Fail(ErrorCode::kInvalid, fmt::format("{} is not a file; name a trace file", path));
  }
  reader->bytes_total_ = static_cast<uint64_t>(status.st_size);
  MVGPU_RETURN_IF_ERROR(reader->ReadHeader());
  return reader;
}

Result<std::unique_ptr<TraceReader>> TraceReader::FromBytes(std::span<const std::byte> bytes,
                                                            std::string name) {
  std::unique_ptr<TraceReader> reader(new TraceReader(std::move(name)));
  reader->memory_ = bytes;
  reader->bytes_total_ = bytes.size();
  MVGPU_RETURN_IF_ERROR(reader->ReadHeader());
  return reader;
}

TraceReader::TraceReader(std::string name)
    : name_(std::move(name)), zstd_(ZSTD_createDCtx()), input_(ZSTD_DStreamInSize()) {
  ZSTD_DCtx_setParameter(zstd_, ZSTD_d_windowLogMax, kMaxWindowLog);
}

TraceReader::~TraceReader() { ZSTD_freeDCtx(zstd_); }

Error TraceReader::Corrupt(std::string_view what) const {
  return Error(ErrorCode::kCorrupt, fmt::format("{}: {} (record {}, byte {} of {})", name_, what,
                                                records_ + 1, bytes_read_, bytes_total_));
}

Result<void> TraceReader::ReadHeader() {
  MVGPU_RETURN_IF_ERROR(Refill());
  if (input_size_ < kTraceHeaderSize ||
      !std::equal(kTraceMagic.begin(), kTraceMagic.end(), input_.begin())) {
    return Fail(
        ErrorCode::kCorrupt,
        fmt::format("{} is not an mvgpu trace (record one with mvgpu-backend --record=FILE)",
                    name_));
  }
  uint32_t version = 0;
  for (unsigned i = 0; i < 4; ++i) {
    version |= static_cast<uint32_t>(static_cast<unsigned char>(input_[8 + i])) << (8 * i);
  }
  if (version < kOldestTraceVersion || version > kTraceVersion) {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("{} is a trace of version {}, this program reads versions {} to {}",
                            name_, version, kOldestTraceVersion, kTraceVersion));
  }
  input_position_ = kTraceHeaderSize;
  return {};
}

Result<bool> TraceReader::Refill() {
  if (input_position_ < input_size_) return true;
  input_position_ = 0;
  if (fd_.is_valid()) {
    const ssize_t got = read(fd_.get(), input_.data(), input_.size());
    if (got < 0) return FailSystem(errno, fmt::format("reading {}", name_));
    input_size_ = static_cast<size_t>(got);
  } else {
    input_size_ = std::min(input_.size(), memory_.size());
    std::copy_n(reinterpret_cast<const char*>(memory_.data()), input_size_, input_.data());
    memory_ = memory_.subspan(input_size_);
  }
  bytes_read_ += input_size_;
  return input_size_ > 0;
}

Result<bool> TraceReader::Fill(size_t size) {
  if (output_position_ > 0 && output_.size() - output_position_ < size) {
    output_.erase(output_.begin(), output_.begin() + static_cast<std::ptrdiff_t>(output_position_));
    output_position_ = 0;
  }
  std::array<std::byte, 64 << 10> chunk;
  while (output_.size() - output_position_ < size && !at_end_) {
    MVGPU_ASSIGN_OR_RETURN(const bool more, Refill());
    ZSTD_inBuffer input{input_.data(), more ? input_size_ : 0, input_position_};
    ZSTD_outBuffer output{chunk.data(), chunk.size(), 0};
    const size_t left = ZSTD_decompressStream(zstd_, &output, &input);
    if (ZSTD_isError(left)) {
      return tl::unexpected<Error>(Corrupt(fmt::format("damaged: {}", ZSTD_getErrorName(left))));
    }
    input_position_ = input.pos;
    output_.insert(output_.end(), chunk.begin(),
                   chunk.begin() + static_cast<std::ptrdiff_t>(output.pos));
    if (more || output.pos > 0) frame_open_ = left != 0;
    if (!more && output.pos == 0) at_end_ = true;
  }
  return output_.size() - output_position_ >= size;
}

Result<std::optional<TraceRecord>> TraceReader::next() {
  MVGPU_RETURN_IF_ERROR(Fill(kMaxRecordHead));
  ByteReader head(std::span<const std::byte>(output_).subspan(output_position_));
  if (head.rest().empty()) {
    cut_short_ = frame_open_;
    return std::nullopt;
  }
  const auto type = head.varint();
  const auto since = head.varint();
  const auto length = head.varint();
  if (!type || !since || !length) {
    if (!at_end_) return tl::unexpected<Error>(Corrupt("a record head is malformed"));
    cut_short_ = true;
    return std::nullopt;
  }
  if (*type == 0 || *type > kLastTraceType) {
    return tl::unexpected<Error>(Corrupt(fmt::format("unknown record type {}", *type)));
  }
  if (*length > kMaxTracePayload) {
    return tl::unexpected<Error>(Corrupt(
        fmt::format("a record of {} bytes, at most {} are possible", *length, kMaxTracePayload)));
  }
  const size_t head_size = head.position();
  MVGPU_ASSIGN_OR_RETURN(const bool whole, Fill(head_size + *length));
  if (!whole) {
    cut_short_ = true;
    return std::nullopt;
  }
  TraceRecord record{
      static_cast<TraceType>(*type), time_ns_ += records_ == 0 ? 0 : *since,
      std::span<const std::byte>(output_).subspan(output_position_ + head_size, *length)};
  output_position_ += head_size + *length;
  ++records_;
  return record;
}

}  // namespace mvgpu::backend

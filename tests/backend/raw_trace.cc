#include "tests/backend/raw_trace.h"

#include <zstd.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "apionly-domain/base/check.h"

namespace mvgpu::testing {

namespace {

constexpr size_t kHeaderBytes = 16;
constexpr char kHeader[kHeaderBytes + 1] = "MVGPUTRC\2\0\0\0\0\0\0\0";

// Takes a varint off the front of `rest`.
std::optional<uint64_t> TakeVarint(std::span<const std::byte>& rest) {
  uint64_t value = 0;
  for (unsigned shift = 0; shift < 64; shift += 7) {
    if (rest.empty()) return std::nullopt;
    const auto byte = static_cast<uint64_t>(rest.front());
    rest = rest.subspan(1);
    value |= (byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  return std::nullopt;
}

std::optional<RawBytes> Decompress(std::span<const std::byte> compressed) {
  ZSTD_DCtx* context = ZSTD_createDCtx();
  ZSTD_inBuffer input{compressed.data(), compressed.size(), 0};
  RawBytes all;
  RawBytes chunk(1 << 20);
  size_t left = 1;
  while (left != 0 && !ZSTD_isError(left)) {
    ZSTD_outBuffer output{chunk.data(), chunk.size(), 0};
    const size_t before = input.pos;
    left = ZSTD_decompressStream(context, &output, &input);
    all.insert(all.end(), chunk.begin(), chunk.begin() + static_cast<std::ptrdiff_t>(output.pos));
    if (output.pos == 0 && input.pos == before) break;
  }
  ZSTD_freeDCtx(context);
  if (left != 0 || input.pos != input.size) return std::nullopt;
  return all;
}

}  // namespace

RawBytes RawOf(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

void AppendVarint(RawBytes& bytes, uint64_t value) {
  for (; value > 127; value /= 128) bytes.push_back(static_cast<std::byte>(value % 128 + 128));
  bytes.push_back(static_cast<std::byte>(value));
}

RawBytes RawPayload(std::initializer_list<uint64_t> numbers, std::span<const std::byte> bytes) {
  RawBytes payload;
  for (const uint64_t number : numbers) AppendVarint(payload, number);
  payload.insert(payload.end(), bytes.begin(), bytes.end());
  return payload;
}

uint64_t RawRecord::number(size_t n) const {
  std::span<const std::byte> rest(payload);
  for (; n > 0; --n) TakeVarint(rest);
  const auto value = TakeVarint(rest);
  MVGPU_CHECK(value.has_value());
  return *value;
}

RawBytes RawRecord::bytes_after(size_t n) const {
  std::span<const std::byte> rest(payload);
  for (; n > 0; --n) TakeVarint(rest);
  return {rest.begin(), rest.end()};
}

RawBytes EncodeRecords(const std::vector<RawRecord>& records) {
  RawBytes stream;
  for (const RawRecord& record : records) {
    AppendVarint(stream, record.type);
    AppendVarint(stream, record.since_ns);
    AppendVarint(stream, record.payload.size());
    stream.insert(stream.end(), record.payload.begin(), record.payload.end());
  }
  return stream;
}

RawBytes EncodeStream(std::span<const std::byte> stream) {
  RawBytes file = RawOf({kHeader, kHeaderBytes});
  file.resize(kHeaderBytes + ZSTD_compressBound(stream.size()));
  const size_t size = ZSTD_compress(file.data() + kHeaderBytes, file.size() - kHeaderBytes,
                                    stream.data(), stream.size(), 1);
  MVGPU_CHECK(!ZSTD_isError(size));
  file.resize(kHeaderBytes + size);
  return file;
}

RawBytes EncodeTrace(const std::vector<RawRecord>& records) {
  return EncodeStream(EncodeRecords(records));
}

std::optional<std::vector<RawRecord>> DecodeTrace(std::span<const std::byte> file) {
  RawBytes header = RawOf({kHeader, kHeaderBytes});
  if (file.size() > 8 && file[8] == std::byte{1}) header[8] = std::byte{1};  // like it, but older
  if (file.size() < kHeaderBytes || !std::ranges::equal(file.first(kHeaderBytes), header)) {
    return std::nullopt;
  }
  const auto stream = Decompress(file.subspan(kHeaderBytes));
  if (!stream) return std::nullopt;
  std::vector<RawRecord> records;
  std::span<const std::byte> rest(*stream);
  while (!rest.empty()) {
    const auto type = TakeVarint(rest);
    const auto since = TakeVarint(rest);
    const auto size = TakeVarint(rest);
    if (!type || !since || !size || *size > rest.size()) return std::nullopt;
    records.push_back({*type, *since, {rest.begin(), rest.begin() + static_cast<long>(*size)}});
    rest = rest.subspan(*size);
  }
  return records;
}

RawBytes ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return RawOf(std::string{std::istreambuf_iterator<char>(file), {}});
}

void WriteFile(const std::string& path, std::span<const std::byte> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  file.close();
  MVGPU_CHECK(!file.fail());
}

}  // namespace mvgpu::testing

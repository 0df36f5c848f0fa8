#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace mvgpu::backend {

// Appends varints (LEB128), little-endian words and bytes.
class ByteWriter {
 public:
  void varint(uint64_t value) {
    while (value >= 0x80) {
      bytes_.push_back(static_cast<std::byte>(value | 0x80));
      value >>= 7;
    }
    bytes_.push_back(static_cast<std::byte>(value));
  }
  void fixed64(uint64_t value) {
    for (int i = 0; i < 8; ++i) bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
  void bytes(std::span<const std::byte> source) {
    bytes_.insert(bytes_.end(), source.begin(), source.end());
  }
  void text(std::string_view source) { bytes(std::as_bytes(std::span(source))); }

  std::span<const std::byte> view() const { return bytes_; }
  void clear() { bytes_.clear(); }

 private:
  std::vector<std::byte> bytes_;
};

// Takes the same apart again; every step says whether there was enough.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::optional<uint64_t> varint() {
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 64 && position_ < bytes_.size(); shift += 7) {
      const auto byte = static_cast<uint64_t>(bytes_[position_++]);
      if (shift == 63 && byte > 1) return std::nullopt;  // more than 64 bits
      value |= (byte & 0x7f) << shift;
      if ((byte & 0x80) == 0) return value;
    }
    return std::nullopt;
  }
  std::optional<uint64_t> fixed64() {
    if (bytes_.size() - position_ < 8) return std::nullopt;
    uint64_t value = 0;
    for (unsigned i = 0; i < 8; ++i)
      value |= static_cast<uint64_t>(bytes_[position_ + i]) << (8 * i);
    position_ += 8;
    return value;
  }
  std::span<const std::byte> rest() { return bytes_.subspan(position_); }
  std::string_view rest_as_text() {
    const auto left = rest();
    return {reinterpret_cast<const char*>(left.data()), left.size()};
  }
  size_t position() const { return position_; }

 private:
  std::span<const std::byte> bytes_;
  size_t position_ = 0;
};

}  // namespace mvgpu::backend

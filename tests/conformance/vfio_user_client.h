#pragma once

// A vfio-user client for tests. It shares nothing with the server: messages are built from numbers
// as they stand in the specification, so that a wrong struct in the server cannot agree with
// itself.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/unique_fd.h"

namespace mvgpu::testing {

inline constexpr uint16_t kVersion = 1;
inline constexpr uint16_t kDmaMap = 2;
inline constexpr uint16_t kDmaUnmap = 3;
inline constexpr uint16_t kGetInfo = 4;
inline constexpr uint16_t kGetRegionInfo = 5;
inline constexpr uint16_t kGetRegionIoFds = 6;
inline constexpr uint16_t kGetIrqInfo = 7;
inline constexpr uint16_t kSetIrqs = 8;
inline constexpr uint16_t kRegionRead = 9;
inline constexpr uint16_t kRegionWrite = 10;
inline constexpr uint16_t kDmaRead = 11;  // these two come from the server
inline constexpr uint16_t kDmaWrite = 12;
inline constexpr uint16_t kReset = 13;
inline constexpr uint16_t kRegionWriteMulti = 15;
inline constexpr uint16_t kDeviceFeature = 16;

inline constexpr uint32_t kTypeReply = 0x1;
inline constexpr uint32_t kNoReply = 0x10;
inline constexpr uint32_t kErrorReply = 0x21;
inline constexpr size_t kHeaderSize = 16;
inline constexpr uint32_t kMegabyte = 1 << 20;

// Bytes in the order of the wire: Bytes{}.U32(16).U64(0).
class Bytes {
 public:
  Bytes& U8(uint8_t value) { return Append(&value, sizeof(value)); }
  Bytes& U16(uint16_t value) { return Append(&value, sizeof(value)); }
  Bytes& U32(uint32_t value) { return Append(&value, sizeof(value)); }
  Bytes& U64(uint64_t value) { return Append(&value, sizeof(value)); }
  Bytes& Fill(size_t count, uint8_t value = 0) {
    bytes_.resize(bytes_.size() + count, value);
    return *this;
  }
  Bytes& Text(std::string_view text) { return Append(text.data(), text.size()); }
  Bytes& Add(const Bytes& other) { return Append(other.data(), other.size()); }

  const uint8_t* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  Bytes& Append(const void* data, size_t size) {
    const size_t end = bytes_.size();
    bytes_.resize(end + size);
    if (size != 0) std::memcpy(bytes_.data() + end, data, size);
    return *this;
  }
  std::vector<uint8_t> bytes_;
};

struct Reply {
  uint16_t id = 0;
  uint16_t command = 0;
  uint32_t size = 0;
  uint32_t flags = 0;
  uint32_t error = 0;
  std::vector<uint8_t> body;

  template <typename T>
  T at(size_t offset) const {
    T value{};
    if (offset + sizeof(T) <= body.size()) std::memcpy(&value, body.data() + offset, sizeof(T));
    return value;
  }
  uint32_t u32(size_t offset) const { return at<uint32_t>(offset); }
  uint64_t u64(size_t offset) const { return at<uint64_t>(offset); }
};

inline std::ostream& operator<<(std::ostream& os, const Reply& reply) {
  return os << "reply to message " << reply.id << ", command " << reply.command << ", size "
            << reply.size << ", flags " << reply.flags << ", error " << reply.error;
}

// A message with this header; `size` is what the header says.
Bytes MessageOf(uint16_t id, uint16_t command, uint32_t size, uint32_t flags, const Bytes& body);

class VfioUserClient {
 public:
  explicit VfioUserClient(UniqueFd socket) : socket_(std::move(socket)) {}

  // Never blocks. The number of bytes that the socket took, descriptors with the first of them.
  size_t send_some(const uint8_t* data, size_t size, const std::vector<int>& fds = {});
  // Sends a message that fits into the socket's buffer.
  bool send(const Bytes& bytes, const std::vector<int>& fds = {}) {
    return send_some(bytes.data(), bytes.size(), fds) == bytes.size();
  }
  // A well-framed command; returns its message id.
  uint16_t command(uint16_t command, const Bytes& body, const std::vector<int>& fds = {},
                   uint32_t flags = 0);

  // Answers a command of the server's: its 16 bytes again, then data; or with an errno alone.
  bool answer(const Reply& command, const Bytes& data = {});
  bool refuse(const Reply& command, uint32_t sys_errno);

  // The next reply, or command of the server's, if all of it has arrived. Never blocks.
  std::optional<Reply> receive();
  // The bytes that one read of the socket returns, as clients that read only once see them.
  std::vector<uint8_t> read_once(size_t max_size);
  // The server has closed its end, and everything it sent has been received.
  bool is_closed();

  int fd() const { return socket_.get(); }
  void close() { socket_.reset(); }

 private:
  void Fetch();

  UniqueFd socket_;
  uint16_t next_id_ = 100;
  std::vector<uint8_t> received_;
  bool has_ended_ = false;
};

}  // namespace mvgpu::testing

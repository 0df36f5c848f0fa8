#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "vmm-glue/vfio_user/protocol.h"

namespace mvgpu::glue::vfio_user {

// One message of the client, in our own memory. A handler takes the descriptors that it consumes;
// the others are closed with the message.
struct Message {
  // What is wrong with the frame around the payload.
  enum class Defect : uint8_t {
    kNone,
    kTooSmall,    // size < 16; there is no payload, and the stream is in step
    kTooLarge,    // beyond kMaxMessageSize; the payload was not read, and the stream is lost
    kTooManyFds,  // more than kMaxMessageFds, or the process has no descriptor left for them
  };

  Header header{};
  std::vector<std::byte> payload;
  std::vector<UniqueFd> fds;
  Defect defect = Defect::kNone;

  bool wants_reply() const { return (header.flags & kHeaderNoReply) == 0; }
  // Keeps the buffers' capacity.
  void clear() {
    header = {};
    payload.clear();
    fds.clear();
    defect = Defect::kNone;
  }
};

// The payload of a reply, grown by the handler.
using Payload = std::vector<std::byte>;

// The T at `offset` of a payload. kInvalid when it is not there in full.
template <typename T>
Result<T> ReadStruct(std::span<const std::byte> payload, size_t offset = 0) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (payload.size() < offset || payload.size() - offset < sizeof(T)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("payload has {} bytes, {} needed", payload.size(), offset + sizeof(T)));
  }
  T value;
  std::memcpy(&value, payload.data() + offset, sizeof(T));
  return value;
}

// The same for a struct that starts with argsz, which must say at least the struct's size. Clients
// differ in what they put there (16 to 4064 for the same command), so that only the lower bound is
// checked.
template <typename T>
Result<T> ReadArguments(std::span<const std::byte> payload) {
  MVGPU_ASSIGN_OR_RETURN(T value, ReadStruct<T>(payload));
  if (value.argsz < sizeof(T)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("argsz is {}, at least {} needed", value.argsz, sizeof(T)));
  }
  return value;
}

template <typename T>
void AppendStruct(Payload& payload, const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && std::has_unique_object_representations_v<T>);
  const size_t offset = payload.size();
  payload.resize(offset + sizeof(T));
  std::memcpy(payload.data() + offset, &value, sizeof(T));
}

}  // namespace mvgpu::glue::vfio_user

#include "apionly-domain/base/error.h"

#include <fmt/format.h>

#include <system_error>

namespace mvgpu {

namespace {

struct CodeEntry {
  std::string_view name;
  int sys_errno;
};

CodeEntry EntryOf(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalid:
      return {"invalid", EINVAL};
    case ErrorCode::kOverlap:
      return {"overlap", EEXIST};
    case ErrorCode::kNotMapped:
      return {"not_mapped", ENOENT};
    case ErrorCode::kWouldSplit:
      return {"would_split", EINVAL};
    case ErrorCode::kPermission:
      return {"permission", EPERM};
    case ErrorCode::kNotReachable:
      return {"not_reachable", EFAULT};
    case ErrorCode::kLimit:
      return {"limit", ENOMEM};
    case ErrorCode::kNotContiguous:
      return {"not_contiguous", EINVAL};
    case ErrorCode::kBusy:
      return {"busy", EBUSY};
    case ErrorCode::kRevoked:
      return {"revoked", ENODEV};
    case ErrorCode::kPending:
      return {"pending", EAGAIN};
    case ErrorCode::kTruncated:
      return {"truncated", EFAULT};
    case ErrorCode::kSystem:
      return {"system", EIO};
    case ErrorCode::kProtocol:
      return {"protocol", EPROTO};
    case ErrorCode::kCorrupt:
      return {"corrupt", EINVAL};
  }
  return {"unknown", EIO};
}

}  // namespace

std::string_view ErrorCodeName(ErrorCode code) { return EntryOf(code).name; }

int ErrnoOf(ErrorCode code) { return EntryOf(code).sys_errno; }

Error Error::System(int sys_errno, std::string_view message) {
  Error error(ErrorCode::kSystem,
              fmt::format("{}: {}", message, std::generic_category().message(sys_errno)));
  error.sys_errno_ = sys_errno;
  return error;
}

Error Error::in(std::string_view context) && {
  message_ = fmt::format("{}: {}", context, message_);
  return std::move(*this);
}

}  // namespace mvgpu

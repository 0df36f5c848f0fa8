#pragma once

#include <cerrno>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include <tl/expected.hpp>

namespace mvgpu {

// Why an operation failed, in terms that every edge (guest reply, vfio-user errno, exit code, JSON)
// can translate. The message of an Error carries the values; the code decides what the edge
// answers.
enum class ErrorCode : uint8_t {
  kInvalid,        // the request itself makes no sense
  kOverlap,        // the range is mapped already, differently
  kNotMapped,      // no mapping there, or a hole inside the range
  kWouldSplit,     // the unmap would cut a mapping in two
  kPermission,     // the mapping does not allow this access
  kNotReachable,   // the mapping has no file behind it: no pointer, no pin
  kLimit,          // a limit of ours or of the kernel (RLIMIT_MEMLOCK, mapping count, budget)
  kNotContiguous,  // one address for all of it does not exist; ask for 4 KiB pages
  kBusy,           // held by somebody who did not let go, or about to be unmapped
  kRevoked,        // the mapping behind a handle has gone
  kPending,        // the bytes are on their way: undo what was begun, and ask again
  kTruncated,      // the backing file is shorter than the mapping
  kSystem,         // a system call failed; see sys_errno()
  kProtocol,       // the peer broke the protocol; the connection cannot go on
  kCorrupt,        // a file of ours (ledger, trace) is damaged or of another version
};

// The name as it stands in JSON reports, e.g. "not_mapped".
std::string_view ErrorCodeName(ErrorCode code);

// The errno that a VFIO user expects for this code (EINVAL, EEXIST, ENOENT, EPERM, ENOMEM, EBUSY,
// ...).
int ErrnoOf(ErrorCode code);

class [[nodiscard]] Error {
 public:
  Error(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}
  // kSystem, with errno's text appended: "<message>: <strerror>".
  static Error System(int sys_errno, std::string_view message);
  // The same error, with what could not be done because of it in front.
  Error in(std::string_view context) &&;

  ErrorCode code() const { return code_; }
  int sys_errno() const { return sys_errno_; }
  // What a peer that speaks errno is told.
  int errno_value() const { return sys_errno_ != 0 ? sys_errno_ : ErrnoOf(code_); }
  // One line, lower case, no full stop: object, values, remedy.
  const std::string& message() const { return message_; }

 private:
  ErrorCode code_;
  int sys_errno_ = 0;
  std::string message_;
};

template <typename T>
using Result = tl::expected<T, Error>;

inline tl::unexpected<Error> Fail(ErrorCode code, std::string message) {
  return tl::unexpected<Error>(Error(code, std::move(message)));
}
inline tl::unexpected<Error> FailSystem(int sys_errno, std::string_view message) {
  return tl::unexpected<Error>(Error::System(sys_errno, message));
}

}  // namespace mvgpu

// Leaves the function with the error of a Result<...> expression, if it has one.
#define MVGPU_RETURN_IF_ERROR(expression)                                        \
  do {                                                                           \
    if (auto mvgpu_result_ = (expression); !mvgpu_result_.has_value()) {         \
      return ::tl::unexpected<::mvgpu::Error>(std::move(mvgpu_result_).error()); \
    }                                                                            \
  } while (false)

#define MVGPU_CONCAT_(a, b) a##b
#define MVGPU_CONCAT(a, b) MVGPU_CONCAT_(a, b)
// MVGPU_ASSIGN_OR_RETURN(auto value, Compute()); leaves with the error, or goes on with the value.
#define MVGPU_ASSIGN_OR_RETURN(declaration, expression) \
  MVGPU_ASSIGN_OR_RETURN_(MVGPU_CONCAT(mvgpu_result_, __LINE__), declaration, expression)
#define MVGPU_ASSIGN_OR_RETURN_(result, declaration, expression)                               \
  auto result = (expression);                                                                  \
  if (!result.has_value()) return ::tl::unexpected<::mvgpu::Error>(std::move(result).error()); \
  declaration = std::move(*result)

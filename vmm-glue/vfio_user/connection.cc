#include "vmm-glue/vfio_user/connection.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace mvgpu::glue::vfio_user {

namespace {

bool PeerHasGone(int sys_errno) { return sys_errno == EPIPE || sys_errno == ECONNRESET; }
bool WouldBlock(int sys_errno) { return sys_errno == EAGAIN || sys_errno == EWOULDBLOCK; }

}  // namespace

Result<Connection::Received> Connection::receive(Message& message) {
  if (header_received_ < sizeof(Header)) {
    MVGPU_ASSIGN_OR_RETURN(const Progress progress, ReceiveHeader());
    if (progress == Progress::kBlocked) return Received::kNothing;
    if (progress == Progress::kEnd) {
      if (header_received_ == 0) return Received::kClosed;
      return Fail(ErrorCode::kProtocol,
                  fmt::format("the client left {} bytes into a header", header_received_));
    }
  }
  if (partial_.defect != Message::Defect::kTooSmall &&
      partial_.defect != Message::Defect::kTooLarge) {
    MVGPU_ASSIGN_OR_RETURN(const Progress progress, ReceiveBody());
    if (progress == Progress::kBlocked) return Received::kNothing;
    if (progress == Progress::kEnd) {
      return Fail(ErrorCode::kProtocol,
                  fmt::format("the client left {} bytes into a {} message of {} bytes",
                              sizeof(Header) + body_received_, CommandName(partial_.header.command),
                              partial_.header.size));
    }
  }
  std::swap(message, partial_);
  partial_.clear();
  header_received_ = 0;
  body_received_ = 0;
  return Received::kMessage;
}

Result<Connection::Progress> Connection::ReceiveHeader() {
  while (header_received_ < sizeof(Header)) {
    iovec vector{reinterpret_cast<std::byte*>(&partial_.header) + header_received_,
                 sizeof(Header) - header_received_};
    alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMaxMessageFds * sizeof(int))> control;
    msghdr socket_message{};
    socket_message.msg_iov = &vector;
    socket_message.msg_iovlen = 1;
    socket_message.msg_control = control.data();
    socket_message.msg_controllen = control.size();
    const ssize_t got = recvmsg(fd(), &socket_message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (WouldBlock(errno)) return Progress::kBlocked;
      if (PeerHasGone(errno)) return Progress::kEnd;
      return FailSystem(errno, "cannot read from the vfio-user client");
    }
    TakeFds(socket_message);
    if (got == 0) return Progress::kEnd;
    header_received_ += static_cast<size_t>(got);
  }
  const uint32_t size = partial_.header.size;
  if (size < sizeof(Header)) {
    partial_.defect = Message::Defect::kTooSmall;
  } else if (size > kMaxMessageSize) {
    partial_.defect = Message::Defect::kTooLarge;
  } else {
    partial_.payload.resize(size - sizeof(Header));
  }
  return Progress::kComplete;
}

// Descriptors that ride on the body have no place in the protocol: recv() without a control buffer
// makes the kernel drop them.
Result<Connection::Progress> Connection::ReceiveBody() {
  while (body_received_ < partial_.payload.size()) {
    const ssize_t got = recv(fd(), partial_.payload.data() + body_received_,
                             partial_.payload.size() - body_received_, MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EINTR) continue;
      if (WouldBlock(errno)) return Progress::kBlocked;
      if (PeerHasGone(errno)) return Progress::kEnd;
      return FailSystem(errno, "cannot read from the vfio-user client");
    }
    if (got == 0) return Progress::kEnd;
    body_received_ += static_cast<size_t>(got);
  }
  return Progress::kComplete;
}

void Connection::TakeFds(msghdr& socket_message) {
  for (cmsghdr* control = CMSG_FIRSTHDR(&socket_message); control != nullptr;
       control = CMSG_NXTHDR(&socket_message, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
      partial_.fds.emplace_back(fd);
    }
  }
  // A header in pieces can bring descriptors with each of them.
  if ((socket_message.msg_flags & MSG_CTRUNC) != 0 || partial_.fds.size() > kMaxMessageFds) {
    partial_.defect = Message::Defect::kTooManyFds;
    partial_.fds.clear();
  }
}

Result<bool> Connection::send(const Header& header, std::span<const std::byte> payload) {
  MutexLock lock(send_mutex_);
  const auto deadline = std::chrono::steady_clock::now() + send_timeout_;
  const auto header_bytes = std::as_bytes(std::span(&header, 1));
  const size_t size = header_bytes.size() + payload.size();
  for (size_t sent = 0; sent < size;) {
    // sendmsg() reads only, but its iovec is not const.
    std::array<iovec, 2> vectors{};
    const size_t header_sent = std::min(sent, header_bytes.size());
    const size_t payload_sent = sent - header_sent;
    vectors[0] = {const_cast<std::byte*>(header_bytes.data()) + header_sent,
                  header_bytes.size() - header_sent};
    vectors[1] = {const_cast<std::byte*>(payload.data()) + payload_sent,
                  payload.size() - payload_sent};
    msghdr socket_message{};
    socket_message.msg_iov = vectors.data();
    socket_message.msg_iovlen = vectors.size();
    const ssize_t put = sendmsg(fd(), &socket_message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put >= 0) {
      sent += static_cast<size_t>(put);
    } else if (WouldBlock(errno)) {
      MVGPU_RETURN_IF_ERROR(WaitUntilWritable(deadline));
    } else if (PeerHasGone(errno)) {
      return false;
    } else if (errno != EINTR) {
      return FailSystem(errno, "cannot write to the vfio-user client");
    }
  }
  return true;
}

Result<void> Connection::WaitUntilWritable(std::chrono::steady_clock::time_point deadline) const {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::steady_clock::now());
  pollfd poll_fd{fd(), POLLOUT, 0};
  const int ready = left.count() > 0 ? poll(&poll_fd, 1, static_cast<int>(left.count())) : 0;
  if (ready < 0 && errno != EINTR) return FailSystem(errno, "cannot wait for the vfio-user client");
  if (ready == 0) {
    return Fail(ErrorCode::kProtocol, fmt::format("the client did not read its reply within {} ms",
                                                  send_timeout_.count()));
  }
  return {};
}

}  // namespace mvgpu::glue::vfio_user

#include "tests/conformance/vfio_user_client.h"

#include <sys/socket.h>

#include <array>
#include <cerrno>

namespace mvgpu::testing {

Bytes MessageOf(uint16_t id, uint16_t command, uint32_t size, uint32_t flags, const Bytes& body) {
  return Bytes{}.U16(id).U16(command).U32(size).U32(flags).U32(0).Add(body);
}

size_t VfioUserClient::send_some(const uint8_t* data, size_t size, const std::vector<int>& fds) {
  iovec vector{const_cast<uint8_t*>(data), size};
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  const size_t fd_bytes = fds.size() * sizeof(int);
  std::vector<uint8_t> control(CMSG_SPACE(fd_bytes));
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(fd_bytes);
    std::memcpy(CMSG_DATA(head), fds.data(), fd_bytes);
  }
  const ssize_t sent = sendmsg(fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  return sent < 0 ? 0 : static_cast<size_t>(sent);
}

uint16_t VfioUserClient::command(uint16_t command, const Bytes& body, const std::vector<int>& fds,
                                 uint32_t flags) {
  const uint16_t id = next_id_++;
  send(MessageOf(id, command, static_cast<uint32_t>(kHeaderSize + body.size()), flags, body), fds);
  return id;
}

bool VfioUserClient::answer(const Reply& command, const Bytes& data) {
  const Bytes body = Bytes{}.U64(command.u64(0)).U64(command.u64(8)).Add(data);
  return send(MessageOf(command.id, command.command,
                        static_cast<uint32_t>(kHeaderSize + body.size()), kTypeReply, body));
}

bool VfioUserClient::refuse(const Reply& command, uint32_t sys_errno) {
  return send(Bytes{}
                  .U16(command.id)
                  .U16(command.command)
                  .U32(kHeaderSize)
                  .U32(kErrorReply)
                  .U32(sys_errno));
}

void VfioUserClient::Fetch() {
  std::array<uint8_t, 65536> buffer;
  for (;;) {
    const ssize_t got = recv(fd(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (got > 0) {
      received_.insert(received_.end(), buffer.begin(), buffer.begin() + got);
      continue;
    }
    if (got == 0 || (errno != EAGAIN && errno != EINTR)) has_ended_ = true;
    return;
  }
}

std::optional<Reply> VfioUserClient::receive() {
  Fetch();
  if (received_.size() < kHeaderSize) return std::nullopt;
  Reply reply;
  std::memcpy(&reply.id, received_.data(), 2);
  std::memcpy(&reply.command, received_.data() + 2, 2);
  std::memcpy(&reply.size, received_.data() + 4, 4);
  std::memcpy(&reply.flags, received_.data() + 8, 4);
  std::memcpy(&reply.error, received_.data() + 12, 4);
  if (reply.size < kHeaderSize || received_.size() < reply.size) return std::nullopt;
  const auto end = received_.begin() + reply.size;
  reply.body.assign(received_.begin() + kHeaderSize, end);
  received_.erase(received_.begin(), end);
  return reply;
}

std::vector<uint8_t> VfioUserClient::read_once(size_t max_size) {
  std::vector<uint8_t> bytes(max_size);
  const ssize_t got = recv(fd(), bytes.data(), bytes.size(), MSG_DONTWAIT);
  bytes.resize(got > 0 ? static_cast<size_t>(got) : 0);
  return bytes;
}

bool VfioUserClient::is_closed() {
  Fetch();
  return has_ended_ && received_.empty();
}

}  // namespace mvgpu::testing

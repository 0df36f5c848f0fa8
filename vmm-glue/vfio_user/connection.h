#pragma once

#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/base/unique_fd.h"
#include "vmm-glue/vfio_user/message.h"

namespace mvgpu::glue::vfio_user {

// Cuts the byte stream of one client into messages, and sends replies.
//
// Receiving never waits: what has arrived is kept until the rest comes, so that a client that
// stalls in the middle of a message stops nobody. Header and body are read by separate calls on
// purpose: descriptors belong to the first byte of a header, and a read across messages could not
// tell whose they are. Sending waits a bounded time for a client that does not read.
//
// receive() is used by one thread, send() by several. Neither call raises SIGPIPE; the socket's own
// blocking mode is left as it is.
class Connection {
 public:
  enum class Received : uint8_t {
    kNothing,  // no complete message yet: wait until the socket is readable
    kMessage,  // one message, perhaps with a Defect
    kClosed,   // the client has left between two messages
  };

  Connection(UniqueFd socket, std::chrono::milliseconds send_timeout)
      : socket_(std::move(socket)), send_timeout_(send_timeout) {}

  int fd() const { return socket_.get(); }

  // Fills `message` when the result is kMessage. Errors: kProtocol (the client left in the middle
  // of a message), kSystem. After a message with Defect::kTooLarge nothing more can be received.
  Result<Received> receive(Message& message);

  // Sends header and payload, as one packet where the socket has room: several clients read a reply
  // with a single call. False when the client has gone. Errors: kProtocol (it did not read within
  // the timeout), kSystem.
  Result<bool> send(const Header& header, std::span<const std::byte> payload);

  // Ends the connection for both sides; the thread that receives finds that the client has left.
  void shut_down() { shutdown(fd(), SHUT_RDWR); }

 private:
  enum class Progress : uint8_t { kComplete, kBlocked, kEnd };

  Result<Progress> ReceiveHeader();
  Result<Progress> ReceiveBody();
  void TakeFds(msghdr& socket_message);
  Result<void> WaitUntilWritable(std::chrono::steady_clock::time_point deadline) const;

  const UniqueFd socket_;
  const std::chrono::milliseconds send_timeout_;
  Mutex send_mutex_;  // innermost; held while one message is sent

  Message partial_;             // the message that is arriving
  size_t header_received_ = 0;  // bytes
  size_t body_received_ = 0;    // bytes
};

}  // namespace mvgpu::glue::vfio_user

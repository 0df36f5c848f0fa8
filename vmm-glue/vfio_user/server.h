#pragma once

// The vfio-user server: serves one VfioDevice to one client, which is a VMM or a user-space driver.
//
//   connection.h   the socket: bytes to messages, replies to bytes
//   version.h      the first message, by which client and server agree
//   commands.h     the other messages, one file per group
//   dma_requests.h the two commands that go the other way
//   listener.h     where clients connect
//
// Messages are handled one at a time in the order of their arrival, and each reply leaves before
// the next message is looked at. What the client sends is hostile: a message that makes no sense is
// answered with an errno, reported in one line, and the connection goes on. Only what loses the
// step of the stream, or a failed version exchange, ends it. A command that wants no reply gets
// none, not even an error.
//
// What the client sends in answer to our own commands comes in between, and is handed on.
//
// Where the specification, libvfio-user and the clients disagree, the clients win: QEMU's and Cloud
// Hypervisor's reply sizes, unmaps of ranges that were never mapped, reads that must not fail.

#include <chrono>
#include <memory>
#include <string_view>
#include <utility>

#include "apionly-domain/base/error.h"
#include "apionly-domain/base/unique_fd.h"
#include "vmm-glue/vfio_device.h"
#include "vmm-glue/vfio_user/connection.h"
#include "vmm-glue/vfio_user/dma_requests.h"
#include "vmm-glue/vfio_user/message.h"

namespace mvgpu::glue::vfio_user {

// Used by one thread, the one that the device may be called from. Commands of ours are sent by the
// thread that needs their answer.
class Server final : private DmaRequests::Sender {
 public:
  // Hears of messages that were refused. The client can cause as many lines as it likes: the
  // implementation limits their rate.
  class Log {
   public:
    virtual ~Log() = default;
    virtual void warn(std::string_view line) = 0;
  };
  struct Options {
    // How long a reply may wait for a client that does not read.
    std::chrono::milliseconds send_timeout{5000};
    // Gets a client to ask, from the version exchange to the end of the server, which it outlives.
    // Null: nobody asks, and what looks like an answer is refused.
    DmaRequests* dma_requests = nullptr;
  };

  // `socket` is a connected UNIX stream socket; kInvalid otherwise. Device and log outlive the
  // server.
  static Result<std::unique_ptr<Server>> Create(UniqueFd socket, VfioDevice* device, Log* log,
                                                Options options);
  static Result<std::unique_ptr<Server>> Create(UniqueFd socket, VfioDevice* device, Log* log) {
    return Create(std::move(socket), device, log, Options{});
  }
  // The client's hold on the device ends here, not earlier: interrupts are unbound, the device is
  // reset, everything is unmapped. Until then it stands as the client left it.
  ~Server() override;
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // To be polled for reading.
  int fd() const { return connection_.fd(); }

  // Handles the messages that have arrived, a bounded number of them; never waits for more. False
  // when the client has gone. Errors: kProtocol, kSystem. After false or an error the server is of
  // no use.
  Result<bool> service();

 private:
  Server(UniqueFd socket, VfioDevice* device, Log* log, Options options)
      : connection_(std::move(socket), options.send_timeout),
        device_(*device),
        log_(*log),
        dma_requests_(options.dma_requests) {}

  Result<void> send_command(const Header& header, std::span<const std::byte> payload) override;

  // Whether message_ is the answer to a command of ours, which has been handed on.
  bool TakeAnswer();
  // Handles message_ and replies. False when the client has gone.
  Result<bool> Answer();
  Result<void> Handle();
  Result<void> CheckFrame() const;
  Result<void> Negotiate();
  // Header and payload, or the errno alone.
  Result<bool> Reply(const Result<void>& result);

  Connection connection_;
  VfioDevice& device_;               // outlives this, see Create()
  Log& log_;                         // outlives this, see Create()
  DmaRequests* const dma_requests_;  // likewise; may be null
  bool is_negotiated_ = false;
  Message message_;  // being handled
  Payload reply_;    // of message_; kept for its capacity
};

}  // namespace mvgpu::glue::vfio_user

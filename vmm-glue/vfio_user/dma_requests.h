#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include <absl/container/flat_hash_set.h>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "vmm-glue/vfio_user/message.h"
#include "vmm-glue/vfio_user/protocol.h"

namespace mvgpu::glue::vfio_user {

// Memory that the client mapped without a descriptor, read and written by DMA_READ and DMA_WRITE:
// the commands that go from server to client.
//
//   whoever needs bytes   read(), write(): a command for each piece, then a wait for its answer
//   the server            open() when there is a client to ask, take_answer() for what looks like
//   an
//                         answer, close() when the client has gone
//
// One command is under way at a time, with at most 64 KiB: QEMU cuts off answers that its socket
// does not take at once. QEMU serves no command of ours while it waits for a reply, so whoever
// waits here must hold nothing that a reply needs. QEMU before 11 has another layout: it would
// write four bytes beside the place. The first write is therefore preceded by a read of the same
// place, whose answer has the wrong size then.
//
// Thread-safe. Lock order: turn_mutex_, then mutex_, then the sender's.
class DmaRequests final : public domain::RemoteMemory {
 public:
  // Sends a command to the client. Called by the thread that waits for the answer. Errors:
  // kProtocol, kSystem; the connection is of no use then.
  class Sender {
   public:
    virtual ~Sender() = default;
    virtual Result<void> send_command(const Header& header, std::span<const std::byte> payload) = 0;
  };
  static constexpr uint64_t kMaxPiece = 64u << 10;  // bytes
  // Answers that did not come in time and may still come. Nothing more is asked after that many.
  static constexpr size_t kMaxLate = 64;

  // `timeout`: how long an answer may take.
  explicit DmaRequests(std::chrono::milliseconds timeout = std::chrono::seconds(5))
      : timeout_(timeout) {}

  // Errors: kNotReachable (refused, malformed or late answer, with address, size and errno),
  // kProtocol (there is no client). REQUIRES: not called by the thread that calls take_answer().
  Result<void> read(Iova iova, std::span<std::byte> destination) override;
  Result<void> write(Iova iova, std::span<const std::byte> source) override;

  // `max_transfer`: what the client said that one message may carry, bytes.
  void open(Sender* sender, uint64_t max_transfer);
  // Takes the payload of a reply to a command of ours. False: there is no such command.
  bool take_answer(Message& message);
  // Those who wait fail now, those who come later at once. The sender is not used afterwards.
  void close();

 private:
  struct Request {
    Command command;
    Iova iova;
    uint64_t count;  // bytes
  };
  struct Answer {
    Header header;
    std::vector<std::byte> payload;
  };

  // The first piece of a transfer of `size` bytes. Errors: kNotReachable, kProtocol.
  Result<uint64_t> PieceOf(uint64_t size);
  Result<void> ReadPiece(Iova iova, std::span<std::byte> destination)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(turn_mutex_);
  Result<void> WritePiece(Iova iova, std::span<const std::byte> source)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(turn_mutex_);
  // Returns the data of the answer, which has been checked.
  Result<std::vector<std::byte>> Ask(const Request& request, std::span<const std::byte> data)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(turn_mutex_);
  Result<void> Send(uint16_t id, const Request& request, std::span<const std::byte> data);
  Result<Answer> AwaitAnswer(const Request& request);

  const std::chrono::milliseconds timeout_;
  Mutex turn_mutex_;  // held by the thread whose command is under way
  bool is_layout_known_ ABSL_GUARDED_BY(turn_mutex_) = false;

  Mutex mutex_;
  ConditionVariable changed_;
  Sender* sender_ ABSL_GUARDED_BY(mutex_) = nullptr;  // null: no client
  bool is_sending_ ABSL_GUARDED_BY(mutex_) = false;   // close() waits for that
  uint64_t max_piece_ ABSL_GUARDED_BY(mutex_) = 0;
  uint16_t next_id_ ABSL_GUARDED_BY(mutex_) = 0;
  struct UnderWay {
    uint16_t id;
    Command command;
  };
  std::optional<UnderWay> under_way_ ABSL_GUARDED_BY(mutex_);
  std::optional<Answer> answer_ ABSL_GUARDED_BY(mutex_);  // to under_way_
  absl::flat_hash_set<uint16_t> late_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::glue::vfio_user

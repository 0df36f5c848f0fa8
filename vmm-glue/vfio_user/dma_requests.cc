#include "vmm-glue/vfio_user/dma_requests.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace mvgpu::glue::vfio_user {

namespace {

Error Gone() { return Error(ErrorCode::kProtocol, "the vfio-user client has gone"); }

std::string Describe(Command command, Iova iova, uint64_t count) {
  return fmt::format("{} of {} bytes at iova {:#x}", CommandName(static_cast<uint16_t>(command)),
                     count, iova.value());
}

std::string Refusal(uint32_t sys_errno) {
  const char* hint =
      sys_errno == ENODEV ? " (nothing is mapped there, or the guest has bus mastering off)" : "";
  return fmt::format("{}{}", std::generic_category().message(static_cast<int>(sys_errno)), hint);
}

}  // namespace

void DmaRequests::open(Sender* sender, uint64_t max_transfer) {
  MutexLock lock(mutex_);
  sender_ = sender;
  max_piece_ = std::min(max_transfer, kMaxPiece);
}

void DmaRequests::close() {
  MutexLock lock(mutex_);
  sender_ = nullptr;
  changed_.notify_all();
  while (is_sending_) changed_.wait(mutex_);
}

bool DmaRequests::take_answer(Message& message) {
  MutexLock lock(mutex_);
  if (late_.erase(message.header.id) != 0) return true;
  if (!under_way_ || answer_ || message.header.id != under_way_->id ||
      message.header.command != static_cast<uint16_t>(under_way_->command)) {
    return false;
  }
  answer_ = Answer{message.header, std::exchange(message.payload, {})};
  changed_.notify_all();
  return true;
}

Result<void> DmaRequests::read(Iova iova, std::span<std::byte> destination) {
  MutexLock turn(turn_mutex_);
  while (!destination.empty()) {
    MVGPU_ASSIGN_OR_RETURN(const uint64_t size, PieceOf(destination.size()));
    MVGPU_RETURN_IF_ERROR(ReadPiece(iova, destination.first(size)));
    destination = destination.subspan(size);
    iova = iova + size;
  }
  return {};
}

Result<void> DmaRequests::write(Iova iova, std::span<const std::byte> source) {
  MutexLock turn(turn_mutex_);
  while (!source.empty()) {
    MVGPU_ASSIGN_OR_RETURN(const uint64_t size, PieceOf(source.size()));
    MVGPU_RETURN_IF_ERROR(WritePiece(iova, source.first(size)));
    source = source.subspan(size);
    iova = iova + size;
  }
  return {};
}

Result<uint64_t> DmaRequests::PieceOf(uint64_t size) {
  MutexLock lock(mutex_);
  if (sender_ == nullptr) return tl::unexpected<Error>(Gone());
  if (max_piece_ == 0) {
    return Fail(ErrorCode::kNotReachable, "the vfio-user client allows no data in a message");
  }
  return std::min(size, max_piece_);
}

Result<void> DmaRequests::ReadPiece(Iova iova, std::span<std::byte> destination) {
  MVGPU_ASSIGN_OR_RETURN(const std::vector<std::byte> data,
                         Ask({Command::kDmaRead, iova, destination.size()}, {}));
  std::copy(data.begin(), data.end(), destination.begin());
  return {};
}

Result<void> DmaRequests::WritePiece(Iova iova, std::span<const std::byte> source) {
  if (!is_layout_known_) {
    std::byte before;
    MVGPU_RETURN_IF_ERROR(ReadPiece(iova, std::span(&before, 1)));
  }
  MVGPU_RETURN_IF_ERROR(Ask({Command::kDmaWrite, iova, source.size()}, source));
  return {};
}

Result<std::vector<std::byte>> DmaRequests::Ask(const Request& request,
                                                std::span<const std::byte> data) {
  uint16_t id = 0;
  {
    MutexLock lock(mutex_);
    if (late_.size() >= kMaxLate) {
      return Fail(ErrorCode::kNotReachable,
                  fmt::format("the vfio-user client has left {} requests for memory unanswered",
                              late_.size()));
    }
    do id = next_id_++;
    while (late_.contains(id));
    under_way_ = UnderWay{id, request.command};
    answer_.reset();
  }
  MVGPU_RETURN_IF_ERROR(Send(id, request, data));
  MVGPU_ASSIGN_OR_RETURN(Answer answer, AwaitAnswer(request));

  if ((answer.header.flags & kHeaderError) != 0) {
    return Fail(ErrorCode::kNotReachable,
                fmt::format("the vmm refuses a {}: {}",
                            Describe(request.command, request.iova, request.count),
                            Refusal(answer.header.error)));
  }
  const uint64_t data_size = request.command == Command::kDmaRead ? request.count : 0;
  const auto echo = ReadStruct<DmaAccess>(answer.payload);
  if (answer.payload.size() != sizeof(DmaAccess) + data_size || !echo ||
      echo->iova != request.iova.value() || echo->count != request.count) {
    return Fail(
        ErrorCode::kNotReachable,
        fmt::format("the vmm answers a {} with {} bytes that do not fit, as qemu before 11 "
                    "does; take a newer one, or give the vm shared memory",
                    Describe(request.command, request.iova, request.count), answer.payload.size()));
  }
  is_layout_known_ = true;
  answer.payload.erase(answer.payload.begin(), answer.payload.begin() + sizeof(DmaAccess));
  return std::move(answer.payload);
}

Result<void> DmaRequests::Send(uint16_t id, const Request& request,
                               std::span<const std::byte> data) {
  Payload payload;
  AppendStruct(payload, DmaAccess{request.iova.value(), request.count});
  payload.insert(payload.end(), data.begin(), data.end());
  const Header header{.id = id,
                      .command = static_cast<uint16_t>(request.command),
                      .size = static_cast<uint32_t>(sizeof(Header) + payload.size()),
                      .flags = kHeaderTypeCommand,
                      .error = 0};
  Sender* sender = nullptr;
  {
    MutexLock lock(mutex_);
    if (sender_ == nullptr) return tl::unexpected<Error>(Gone());
    sender = sender_;
    is_sending_ = true;
  }
  const auto sent = sender->send_command(header, payload);
  MutexLock lock(mutex_);
  is_sending_ = false;
  changed_.notify_all();
  if (sent) return {};
  sender_ = nullptr;
  under_way_.reset();
  return Fail(ErrorCode::kProtocol, sent.error().message());
}

Result<DmaRequests::Answer> DmaRequests::AwaitAnswer(const Request& request) {
  const auto deadline = std::chrono::steady_clock::now() + timeout_;
  MutexLock lock(mutex_);
  while (!answer_ && sender_ != nullptr) {
    if (changed_.wait_until(mutex_, deadline) == std::cv_status::timeout) break;
  }
  const uint16_t id = std::exchange(under_way_, std::nullopt)->id;
  if (answer_) return *std::exchange(answer_, std::nullopt);
  if (sender_ == nullptr) return tl::unexpected<Error>(Gone());
  late_.insert(id);
  return Fail(
      ErrorCode::kNotReachable,
      fmt::format("the vmm did not answer a {} within {} ms",
                  Describe(request.command, request.iova, request.count), timeout_.count()));
}

}  // namespace mvgpu::glue::vfio_user

#include "vmm-glue/vfio_user/server.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <cerrno>
#include <string>
#include <utility>

#include "vmm-glue/vfio_user/commands.h"
#include "vmm-glue/vfio_user/version.h"

namespace mvgpu::glue::vfio_user {

namespace {

// After these the caller gets a turn, so that a client that never pauses does not own the event
// loop.
constexpr int kMessagesPerService = 256;

using Handler = Result<void> (*)(VfioDevice& device, Message& message, Payload& reply);

Result<void> ResetDevice(VfioDevice& device, Message&, Payload&) {
  device.reset();
  return {};
}

// Null: unknown, or not supported (features, migration), which a client learns from the same
// EINVAL.
Handler HandlerOf(uint16_t command) {
  switch (static_cast<Command>(command)) {
    case Command::kDmaMap:
      return MapDma;
    case Command::kDmaUnmap:
      return UnmapDma;
    case Command::kDeviceGetInfo:
      return GetDeviceInfo;
    case Command::kDeviceGetRegionInfo:
      return GetRegionInfo;
    case Command::kDeviceGetRegionIoFds:
      return GetRegionIoFds;
    case Command::kDeviceGetIrqInfo:
      return GetIrqInfo;
    case Command::kDeviceSetIrqs:
      return SetDeviceIrqs;
    case Command::kRegionRead:
      return ReadRegion;
    case Command::kRegionWrite:
      return WriteRegion;
    case Command::kDeviceReset:
      return ResetDevice;
    case Command::kRegionWriteMulti:
      return WriteRegionMulti;
    case Command::kVersion:
    case Command::kDmaRead:
    case Command::kDmaWrite:
    case Command::kDirtyPages:
    case Command::kDeviceFeature:
    case Command::kMigDataRead:
    case Command::kMigDataWrite:
      return nullptr;
  }
  return nullptr;
}

Result<int> SocketOption(int fd, int option) {
  int value = 0;
  socklen_t size = sizeof(value);
  if (getsockopt(fd, SOL_SOCKET, option, &value, &size) != 0) {
    return FailSystem(errno, fmt::format("descriptor {} is no socket", fd));
  }
  return value;
}

std::string Describe(const Message& message, const Error& error) {
  const Header& header = message.header;
  return fmt::format("vfio-user command {} ({}), message {}, {} bytes, {} descriptors: {}",
                     header.command, CommandName(header.command), header.id, header.size,
                     message.fds.size(), error.message());
}

}  // namespace

Result<std::unique_ptr<Server>> Server::Create(UniqueFd socket, VfioDevice* device, Log* log,
                                               Options options) {
  MVGPU_ASSIGN_OR_RETURN(const int family, SocketOption(socket.get(), SO_DOMAIN));
  MVGPU_ASSIGN_OR_RETURN(const int type, SocketOption(socket.get(), SO_TYPE));
  if (family != AF_UNIX || type != SOCK_STREAM) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("descriptor {} has socket family {} and type {}, vfio-user needs a unix "
                    "stream socket",
                    socket.get(), family, type));
  }
  return std::unique_ptr<Server>(new Server(std::move(socket), device, log, options));
}

Server::~Server() {
  if (dma_requests_ != nullptr) dma_requests_->close();
  // Reset before unmap: what the device holds in guest memory goes first.
  for (uint32_t irq = 0; irq < kIrqCount; ++irq) device_.disable_irqs(irq);
  device_.reset();
  if (const auto unmapped = device_.dma_unmap_all(); !unmapped) {
    log_.warn(fmt::format("cannot unmap the memory of a client that has gone: {}",
                          unmapped.error().message()));
  }
}

Result<bool> Server::service() {
  for (int i = 0; i < kMessagesPerService; ++i) {
    MVGPU_ASSIGN_OR_RETURN(const Connection::Received received, connection_.receive(message_));
    if (received == Connection::Received::kNothing) return true;
    if (received == Connection::Received::kClosed) return false;
    MVGPU_ASSIGN_OR_RETURN(const bool is_connected, Answer());
    if (!is_connected) return false;
  }
  return true;
}

bool Server::TakeAnswer() {
  return dma_requests_ != nullptr && message_.defect == Message::Defect::kNone &&
         (message_.header.flags & kHeaderTypeMask) == kHeaderTypeReply &&
         dma_requests_->take_answer(message_);
}

Result<bool> Server::Answer() {
  if (TakeAnswer()) {
    message_.clear();
    return true;
  }
  reply_.clear();
  const Result<void> result = Handle();
  const bool is_over =
      !result && (!is_negotiated_ || message_.defect == Message::Defect::kTooLarge);
  if (!result && !is_over) log_.warn(Describe(message_, result.error()));
  if (message_.wants_reply()) {
    MVGPU_ASSIGN_OR_RETURN(const bool is_connected, Reply(result));
    if (!is_connected) return false;
  }
  if (is_over) return Fail(ErrorCode::kProtocol, Describe(message_, result.error()));
  // Descriptors that nobody took are closed now, not when the next message comes.
  message_.clear();
  return true;
}

Result<void> Server::Handle() {
  MVGPU_RETURN_IF_ERROR(CheckFrame());
  if (!is_negotiated_) return Negotiate();
  const Handler handler = HandlerOf(message_.header.command);
  if (handler == nullptr) return Fail(ErrorCode::kInvalid, "not supported");
  return handler(device_, message_, reply_);
}

Result<void> Server::CheckFrame() const {
  switch (message_.defect) {
    case Message::Defect::kNone:
      break;
    case Message::Defect::kTooSmall:
      return Fail(ErrorCode::kInvalid,
                  fmt::format("a message has at least {} bytes", sizeof(Header)));
    case Message::Defect::kTooLarge:
      return Fail(ErrorCode::kInvalid,
                  fmt::format("a message has at most {} bytes", kMaxMessageSize));
    case Message::Defect::kTooManyFds:
      return Fail(
          ErrorCode::kInvalid,
          fmt::format("more than {} descriptors came, or this process has reached its limit of "
                      "open files",
                      kMaxMessageFds));
  }
  if ((message_.header.flags & kHeaderTypeMask) != kHeaderTypeCommand) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("flags are {:#x}, which is no command", message_.header.flags));
  }
  return {};
}

Result<void> Server::Negotiate() {
  if (message_.header.command != static_cast<uint16_t>(Command::kVersion)) {
    return Fail(ErrorCode::kInvalid, "the first message must be the version");
  }
  MVGPU_ASSIGN_OR_RETURN(const ClientVersion client, ParseClientVersion(message_.payload));
  AppendServerVersion(client, reply_);
  is_negotiated_ = true;
  if (dma_requests_ != nullptr) dma_requests_->open(this, client.max_data_xfer_size);
  return {};
}

// A command that was cut off leaves the stream out of step, so that the connection ends here.
Result<void> Server::send_command(const Header& header, std::span<const std::byte> payload) {
  auto sent = connection_.send(header, payload);
  if (sent && *sent) return {};
  connection_.shut_down();
  if (!sent) return tl::unexpected<Error>(std::move(sent).error());
  return Fail(ErrorCode::kProtocol, "the vfio-user client has gone");
}

Result<bool> Server::Reply(const Result<void>& result) {
  if (!result) reply_.clear();
  Header header{.id = message_.header.id,
                .command = message_.header.command,
                .size = static_cast<uint32_t>(sizeof(Header) + reply_.size()),
                .flags = kHeaderTypeReply,
                .error = 0};
  if (!result) {
    header.flags |= kHeaderError;
    header.error = static_cast<uint32_t>(result.error().errno_value());
  }
  return connection_.send(header, reply_);
}

}  // namespace mvgpu::glue::vfio_user

#include "tests/backend/remote_device.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

namespace mvgpu::testing {

namespace {

constexpr auto kPatience = std::chrono::seconds(20);

// Waits until there is something to read, or the other end has gone.
bool WaitReadable(int fd, std::chrono::steady_clock::time_point end) {
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
  pollfd poll_fd{fd, POLLIN, 0};
  return left.count() > 0 && poll(&poll_fd, 1, static_cast<int>(left.count())) > 0;
}

}  // namespace

UniqueFd ConnectTo(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) fd.reset();
  return fd;
}

std::optional<Reply> RemoteDevice::receive() {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (true) {
    if (auto reply = NextReply()) return reply;
    if (!WaitReadable(client_.fd(), end)) return std::nullopt;
    if (auto reply = NextReply()) return reply;
    if (client_.is_closed()) return std::nullopt;
  }
}

std::optional<Reply> RemoteDevice::NextReply() {
  while (auto message = client_.receive()) {
    if ((message->flags & 0xf) == kTypeReply) return message;
    asked_.push_back(std::move(*message));
  }
  return std::nullopt;
}

std::vector<Reply> RemoteDevice::take_dma() {
  [[maybe_unused]] const auto nothing = NextReply();  // nobody waits for one
  return std::exchange(asked_, {});
}

size_t RemoteDevice::answer_dma() {
  const std::vector<Reply> asked = take_dma();
  for (const Reply& command : asked) Answer(command);
  return asked.size();
}

void RemoteDevice::Answer(const Reply& command) {
  const uint64_t offset = command.u64(0) - memory_start_;
  const uint64_t count = command.u64(8);
  if (offset > memory_.size() || count > memory_.size() - offset) {
    client_.refuse(command, ENODEV);
    return;
  }
  const auto bytes = memory_.subspan(offset, count);
  if (command.command == kDmaWrite) {
    std::memcpy(bytes.data(), command.body.data() + 16, count);
    client_.answer(command);
  } else {
    client_.answer(command,
                   Bytes{}.Text({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  }
}

bool RemoteDevice::is_hung_up() {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!client_.is_closed()) {
    if (!WaitReadable(client_.fd(), end)) return false;
    while (client_.receive()) {
    }
  }
  return true;
}

std::optional<Reply> RemoteDevice::transact(uint16_t command, const Bytes& body,
                                            const std::vector<int>& fds) {
  const uint16_t id = client_.command(command, body, fds);
  auto reply = receive();
  if (reply && (reply->id != id || reply->command != command)) return std::nullopt;
  return reply;
}

bool RemoteDevice::negotiate() {
  const auto reply = transact(kVersion, Bytes{}.U16(0).U16(1).Text(R"({"capabilities":{}})").U8(0));
  return reply && reply->error == 0 && reply->flags == kTypeReply;
}

Result<Reply> RemoteDevice::Ask(uint16_t command, const Bytes& body,
                                const std::vector<int>& fds) const {
  const auto reply = const_cast<RemoteDevice*>(this)->transact(command, body, fds);
  if (!reply) return Fail(ErrorCode::kProtocol, "no reply");
  if (reply->error != 0) return FailSystem(static_cast<int>(reply->error), "the server refused");
  return *reply;
}

glue::VfioDevice::RegionInfo RemoteDevice::region_info(uint32_t region) const {
  const auto reply = Ask(kGetRegionInfo, Bytes{}.U32(32).U32(0).U32(region).Fill(20));
  if (!reply) return {};
  return {reply->u64(16), (reply->u32(4) & 1) != 0, (reply->u32(4) & 2) != 0};
}

glue::VfioDevice::IrqInfo RemoteDevice::irq_info(uint32_t irq) const {
  const auto reply = Ask(kGetIrqInfo, Bytes{}.U32(16).U32(0).U32(irq).Fill(4));
  if (!reply) return {};
  return {.count = reply->u32(12), .eventfd = (reply->u32(4) & 1) != 0};
}

void RemoteDevice::region_read(uint32_t region, uint64_t offset, std::span<std::byte> data) {
  std::ranges::fill(data, std::byte{0xff});  // what a guest sees when a read fails
  const auto reply =
      Ask(kRegionRead, Bytes{}.U64(offset).U32(region).U32(static_cast<uint32_t>(data.size())));
  if (!reply || reply->body.size() != 16 + data.size()) return;
  std::memcpy(data.data(), reply->body.data() + 16, data.size());
}

void RemoteDevice::region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) {
  Bytes body = Bytes{}.U64(offset).U32(region).U32(static_cast<uint32_t>(data.size()));
  body.Text({reinterpret_cast<const char*>(data.data()), data.size()});
  [[maybe_unused]] const auto reply = Ask(kRegionWrite, body);
}

void RemoteDevice::bind_irqs(uint32_t irq, uint32_t start, std::vector<UniqueFd> eventfds) {
  std::vector<int> fds;
  for (const UniqueFd& fd : eventfds) fds.push_back(fd.get());
  [[maybe_unused]] const auto reply = Ask(
      kSetIrqs,
      Bytes{}.U32(20).U32(0x24).U32(irq).U32(start).U32(static_cast<uint32_t>(fds.size())), fds);
}

void RemoteDevice::disable_irqs(uint32_t irq) {
  [[maybe_unused]] const auto reply =
      Ask(kSetIrqs, Bytes{}.U32(20).U32(0x21).U32(irq).U32(0).U32(0));
}

void RemoteDevice::trigger_irq(uint32_t irq, uint32_t vector) {
  [[maybe_unused]] const auto reply =
      Ask(kSetIrqs, Bytes{}.U32(20).U32(0x21).U32(irq).U32(vector).U32(1));
}

void RemoteDevice::set_irq_masked(uint32_t irq, uint32_t vector, bool masked) {
  [[maybe_unused]] const auto reply =
      Ask(kSetIrqs, Bytes{}.U32(20).U32(masked ? 0x09 : 0x11).U32(irq).U32(vector).U32(1));
}

void RemoteDevice::reset() { [[maybe_unused]] const auto reply = Ask(kReset, {}); }

Result<void> RemoteDevice::dma_map(domain::Container::MapRequest request) {
  std::vector<int> fds;
  if (request.fd.is_valid()) fds.push_back(request.fd.get());
  MVGPU_RETURN_IF_ERROR(Ask(kDmaMap,
                            Bytes{}
                                .U32(32)
                                .U32(static_cast<uint32_t>(request.access))
                                .U64(request.file_offset)
                                .U64(request.iova.value())
                                .U64(request.size),
                            fds));
  return {};
}

Result<uint64_t> RemoteDevice::dma_unmap(Iova start, uint64_t size) {
  MVGPU_ASSIGN_OR_RETURN(const Reply reply,
                         Ask(kDmaUnmap, Bytes{}.U32(24).U32(0).U64(start.value()).U64(size)));
  return reply.u64(16);
}

Result<uint64_t> RemoteDevice::dma_unmap_all() {
  MVGPU_ASSIGN_OR_RETURN(const Reply reply, Ask(kDmaUnmap, Bytes{}.U32(24).U32(2).U64(0).U64(0)));
  return reply.u64(16);
}

}  // namespace mvgpu::testing

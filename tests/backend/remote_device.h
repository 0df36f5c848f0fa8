#pragma once

// A device at the other end of a vfio-user socket, as a VfioDevice: so that the drivers of the
// other tests run against the real program. Messages are made of numbers, see vfio_user_client.h.

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tests/conformance/vfio_user_client.h"
#include "vmm-glue/vfio_device.h"

namespace mvgpu::testing {

// Connects to a UNIX socket; an invalid descriptor when nobody listens.
UniqueFd ConnectTo(const std::string& path);

class RemoteDevice final : public glue::VfioDevice {
 public:
  explicit RemoteDevice(UniqueFd socket) : client_(std::move(socket)) {}

  // Sends a command and waits for its reply; nullopt when none comes, or the other end has hung up.
  std::optional<Reply> transact(uint16_t command, const Bytes& body,
                                const std::vector<int>& fds = {});
  // Waits for the next reply. Commands of the server's are put aside.
  std::optional<Reply> receive();

  // Memory that the VMM mapped without a file, from `iova` on. What the server asks about it is
  // answered in answer_dma() only: like QEMU, which answers nothing while it waits for a reply.
  void set_memory(uint64_t iova, std::span<std::byte> bytes) {
    memory_start_ = iova;
    memory_ = bytes;
  }
  // Answers what the server has asked so far; the number of commands.
  size_t answer_dma();
  // What the server has asked so far; the caller answers.
  std::vector<Reply> take_dma();
  // VERSION; false when the server does not agree.
  bool negotiate();
  // Waits until the other end hangs up.
  bool is_hung_up();
  VfioUserClient& client() { return client_; }

  RegionInfo region_info(uint32_t region) const override;
  IrqInfo irq_info(uint32_t irq) const override;
  void region_read(uint32_t region, uint64_t offset, std::span<std::byte> data) override;
  void region_write(uint32_t region, uint64_t offset, std::span<const std::byte> data) override;
  void bind_irqs(uint32_t irq, uint32_t start, std::vector<UniqueFd> eventfds) override;
  void disable_irqs(uint32_t irq) override;
  void trigger_irq(uint32_t irq, uint32_t vector) override;
  void set_irq_masked(uint32_t irq, uint32_t vector, bool masked) override;
  void reset() override;
  Result<void> dma_map(domain::Container::MapRequest request) override;
  Result<uint64_t> dma_unmap(Iova start, uint64_t size) override;
  Result<uint64_t> dma_unmap_all() override;

 private:
  // The next reply that is here.
  std::optional<Reply> NextReply();
  void Answer(const Reply& command);
  Result<Reply> Ask(uint16_t command, const Bytes& body, const std::vector<int>& fds = {}) const;

  mutable VfioUserClient client_;
  uint64_t memory_start_ = 0;
  std::span<std::byte> memory_;
  std::vector<Reply> asked_;  // commands of the server's
};

}  // namespace mvgpu::testing

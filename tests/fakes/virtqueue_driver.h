#pragma once

// The driver's side of a split virtqueue, well-behaved by default and able to break every rule. It
// has structure definitions of its own: a mistake in the device's cannot hide behind sharing them.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "tests/fakes/guest_ram.h"

namespace mvgpu::testing {

struct VringDesc {
  uint64_t addr = 0;
  uint32_t len = 0;
  uint16_t flags = 0;
  uint16_t next = 0;
};
inline constexpr uint16_t kVringDescNext = 1;
inline constexpr uint16_t kVringDescWrite = 2;
inline constexpr uint16_t kVringDescIndirect = 4;

struct VringUsedElem {
  uint32_t id = 0;
  uint32_t len = 0;
};

// A part of guest RAM that a driver works in: RAM offset 0 is mapped at `iova_base`.
class GuestMemory {
 public:
  GuestMemory(GuestRam* ram, uint64_t iova_base) : ram_(ram), iova_base_(iova_base) {}

  // Takes fresh, zeroed bytes; returns their IOVA.
  uint64_t allocate(uint64_t size, uint64_t alignment = 16);
  // Gives everything back that was taken since `mark`.
  uint64_t mark() const { return next_; }
  void release_to(uint64_t mark) { next_ = mark; }

  template <typename T>
  void put(uint64_t iova, const T& value) {
    ram_->put(iova - iova_base_, value);
  }
  template <typename T>
  T get(uint64_t iova) {
    return ram_->get<T>(iova - iova_base_);
  }
  void put_bytes(uint64_t iova, std::span<const std::byte> bytes);
  std::vector<std::byte> get_bytes(uint64_t iova, size_t size);

 private:
  GuestRam* const ram_;
  const uint64_t iova_base_;
  uint64_t next_ = 0;
};

// Collects the descriptors of one request.
class DescriptorChainBuilder {
 public:
  explicit DescriptorChainBuilder(GuestMemory* memory) : memory_(memory) {}

  DescriptorChainBuilder& readable(std::span<const std::byte> bytes);
  DescriptorChainBuilder& readable(std::string_view text);
  DescriptorChainBuilder& writable(uint32_t size);
  // Whatever the test wants; `next` and its flag are filled in when the chain is laid out.
  DescriptorChainBuilder& raw(uint64_t addr, uint32_t len, uint16_t flags);

  const std::vector<VringDesc>& descriptors() const { return descriptors_; }
  // Where the n-th descriptor points.
  uint64_t address(size_t n) const { return descriptors_[n].addr; }

  // The chain as one indirect descriptor whose table is in guest memory.
  VringDesc as_indirect() const;

 private:
  GuestMemory* const memory_;
  std::vector<VringDesc> descriptors_;
};

class VirtqueueDriver {
 public:
  // Takes room for the rings from `memory`.
  VirtqueueDriver(GuestMemory* memory, uint16_t size);

  uint16_t size() const { return size_; }
  uint64_t descriptors() const { return descriptors_; }
  uint64_t available() const { return available_; }
  uint64_t used() const { return used_; }

  // Lays the chain out in free descriptors and makes it available. Returns its head.
  uint16_t add(const DescriptorChainBuilder& chain);
  uint16_t add_indirect(const DescriptorChainBuilder& chain);
  // The next chain that the device gave back; its descriptors are free again.
  std::optional<VringUsedElem> take_used();
  uint16_t free_descriptors() const { return static_cast<uint16_t>(free_.size()); }

  // Whether the driver has to notify for what it added since this was asked last (event index).
  bool must_notify();

  // Piece by piece, to do it wrong.
  void put_descriptor(uint16_t index, const VringDesc& descriptor);
  void make_available(uint16_t head);
  void set_available_index(uint16_t index);
  uint16_t available_index() const { return available_index_; }
  void set_no_interrupt(bool on);
  void set_used_event(uint16_t event);
  uint16_t used_index();
  uint16_t available_event();

  // Forgets everything and clears the rings, as a driver does before it sets a queue up.
  void restart();

 private:
  GuestMemory* const memory_;
  const uint16_t size_;
  uint64_t descriptors_ = 0;
  uint64_t available_ = 0;
  uint64_t used_ = 0;
  uint16_t available_index_ = 0;
  uint16_t notified_index_ = 0;
  uint16_t used_seen_ = 0;
  std::vector<uint16_t> free_;
  std::vector<std::vector<uint16_t>> chains_;  // by head
};

}  // namespace mvgpu::testing
